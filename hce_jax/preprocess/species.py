"""Of which species genes are, told from how they are called."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

#: What Ensembl ids of genes start with, by species (www.ensembl.org/info/genome/stable_ids/prefixes.html, with G for
#: genes; fly and worm have their own). Those whose single cells are commonly sequenced.
PREFIXES = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSMMUG": "rhesus macaque",
    "ENSMFAG": "crab-eating macaque",
    "ENSCJAG": "marmoset",
    "ENSPTRG": "chimpanzee",
    "ENSGGOG": "gorilla",
    "ENSMICG": "mouse lemur",
    "ENSSSCG": "pig",
    "ENSBTAG": "cow",
    "ENSOARG": "sheep",
    "ENSECAG": "horse",
    "ENSCAFG": "dog",
    "ENSFCAG": "cat",
    "ENSOCUG": "rabbit",
    "ENSCPOG": "guinea pig",
    "ENSMAUG": "golden hamster",
    "ENSMPUG": "ferret",
    "ENSMODG": "opossum",
    "ENSGALG": "chicken",
    "ENSXETG": "clawed frog",
    "FBgn": "fly",
    "WBGene": "worm",
}
#: Genomes that Cell Ranger writes before the genes of a mixture of species, by what their names begin with.
GENOMES = {"GRCh": "human", "hg": "human", "GRCm": "mouse", "mm": "mouse", "mRatBN": "rat"}

_ID = re.compile(rf"({'|'.join(PREFIXES)})\d{{7,}}(\.\d+)?")
_GENOME = re.compile(rf"({'|'.join(GENOMES)})[\d.]+_+(?=[^_])")
#: How symbols are written: clones without a name of their own by zebrafish's nomenclature; Cd3d, mt-Co1, 1700001C19Rik
#: by that of mouse and rat; CD3D, MT-CO1, C1orf112 by that of human genes, which most others follow. And the share of
#: names like this that tells.
_STYLES = (
    (("zebrafish",), re.compile(r"(si|zgc):.+"), 0.01),
    (("mouse", "rat"), re.compile(r"(mt-)?[A-Z][a-z][\w.-]*|\d{7}[A-Z]\d\dRik|[A-Z]\d{6}[A-Z]\d\dRik"), 0.5),
    (tuple(each for each in PREFIXES.values() if each not in ("mouse", "rat", "zebrafish")),
     re.compile(r"[A-Z][A-Z0-9.-]*(orf[\dA-Z.-]+)?"), 0.5),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Species:
    """Of which species some genes may be.

    Attributes
    ----------
    names
        The species, all those whose genes are called so.
    seen
        For a person: by what it was recognised.
    """

    names: tuple[str, ...]
    seen: str

    def __str__(self) -> str:
        return f"{self.called} genes ({self.seen})"

    @property
    def called(self) -> str:
        """For a person: the species."""
        return " or ".join(self.names) if len(self.names) < 3 else f"{self.names[0]}-like"


def recognise_species(genes: Sequence[str]) -> Species | None:
    """Tell of which species most of some genes are, from their Ensembl ids, or else from how their symbols are written.

    Examples
    --------
    >>> recognise_species(["ENSMUSG00000032094", "ENSMUSG00000026395.17", "Gm1992"])
    Species(names=('mouse',), seen='ENSMUSG...: 2 of 3')
    >>> recognise_species(["Cd3d", "mt-Co1", "Sox17"]).names
    ('mouse', 'rat')
    >>> recognise_species(["gene1", "gene2"]) is None
    True
    """
    prefixes = Counter(match[1] for gene in genes if (match := _ID.fullmatch(gene)))
    if prefixes:
        prefix, count = prefixes.most_common(1)[0]
        if 2 * count > sum(prefixes.values()) and (2 * count > len(genes) or count >= 100):
            return Species((PREFIXES[prefix],), f"{prefix}...: {count:,} of {len(genes):,}")
    symbols = [gene for gene in genes if not _ID.fullmatch(gene)]
    for names, style, least in _STYLES:
        like_this = [symbol for symbol in symbols if style.fullmatch(symbol)]
        if len(like_this) > least * len(genes):
            return Species(names, f"{', '.join(like_this[:2])}, ...: {len(like_this):,} of {len(genes):,}")
    return None


def other_species(genes: Sequence[str], ours: Species | None) -> Species | None:
    """Tell of which species genes are if it is another than ours; None if it is ours, or one of both cannot be told.

    Examples
    --------
    >>> print(other_species(["Cd3d", "Cd4"], Species(("human",), "ENSG...: 5 of 5")))
    mouse or rat genes (Cd3d, Cd4, ...: 2 of 2)
    """
    theirs = recognise_species(genes)
    return theirs if theirs and ours and not set(theirs.names) & set(ours.names) else None


def without_genome(gene: str) -> tuple[str, str | None]:
    """Take off a gene's name the genome that Cell Ranger writes in mixtures of species; and say which species it is.

    Examples
    --------
    >>> without_genome("GRCh38_CD3D"), without_genome("mm10___Cd3d"), without_genome("CD3D")
    (('CD3D', 'human'), ('Cd3d', 'mouse'), ('CD3D', None))
    """
    if (match := _GENOME.match(gene)) is None:
        return gene, None
    return gene[match.end() :], GENOMES[match[1]]
