"""Write ``hce_jax/store/simulated_cell_types.csv``: the cell types of the simulated atlas, from the Cell Ontology.

    python tools/simulated_cell_types.py

The terms are chosen here by id; labels and ancestors come from the package cellxgene-ontology-guide, which carries the
ontology. A type's parents in the table are its nearest ancestors (is_a closure) among the chosen terms.
"""

import csv
import io
from pathlib import Path

from cellxgene_ontology_guide.ontology_parser import OntologyParser

#: Pins the Cell Ontology: this CELLxGENE schema version stands for one release of it.
SCHEMA_VERSION = "v7.1.0"

TABLE = Path(__file__).parents[1] / "hce_jax" / "store" / "simulated_cell_types.csv"

#: Blood and immune cells, deep where studies really differ in how finely they name (T cells), shallow elsewhere.
CHOSEN = (
    # haematopoietic stem cell; the ontology has nothing above it among these
    "CL:0000037",
    # lymphocyte; T cell: alpha-beta, gamma-delta, CD4, CD8, memory, mucosal-associated invariant
    *("CL:0000542", "CL:0000084", "CL:0000789", "CL:0000798", "CL:0000624", "CL:0000625", "CL:0000813", "CL:0000940"),
    # CD4: naive, memory, central memory, effector memory, helper, T-helper 17, T follicular helper
    *("CL:0000895", "CL:0000897", "CL:0000904", "CL:0000905", "CL:0000492", "CL:0000899", "CL:0002038"),
    # regulatory: any, naive, memory
    *("CL:0000815", "CL:0002677", "CL:0002678"),
    # CD8: naive, memory, central memory, effector memory, terminally differentiated
    *("CL:0000900", "CL:0000909", "CL:0000907", "CL:0000913", "CL:0001062"),
    # B lineage, B cell: naive, memory, switched, unswitched, germinal centre, plasmablast
    *("CL:0000945", "CL:0000236", "CL:0000788", "CL:0000787"),
    *("CL:0000972", "CL:0000970", "CL:0000844", "CL:0000980"),
    # plasma cell: IgA, IgG
    *("CL:0000786", "CL:0000987", "CL:0000985"),
    # innate lymphoid cell: group 3, natural killer, CD16+ CD56-dim, CD16- CD56-bright
    *("CL:0001065", "CL:0001071", "CL:0000623", "CL:0000939", "CL:0000938"),
    # myeloid cell; monocyte: classical, non-classical, intermediate; macrophage
    *("CL:0000763", "CL:0000576", "CL:0000860", "CL:0000875", "CL:0002393", "CL:0000235"),
    # dendritic cell: conventional, CD1c+, plasmacytoid
    *("CL:0000451", "CL:0000990", "CL:0002399", "CL:0000784"),
    # granulocyte: neutrophil, basophil; mast cell
    *("CL:0000094", "CL:0000775", "CL:0000767", "CL:0000097"),
    # megakaryocyte, platelet; erythroid lineage cell: erythroblast, erythrocyte
    *("CL:0000556", "CL:0000233", "CL:0000764", "CL:0000765", "CL:0000232"),
)


def table_text() -> str:
    """Return the whole table as text: one comment line, a header, one row per type in the order of the labels."""
    ontology = OntologyParser(schema_version=SCHEMA_VERSION)
    release = ontology.cxg_schema.supported_ontologies["CL"]["version"]
    ancestors = {cl_id: set(ontology.get_term_ancestors(cl_id)) & set(CHOSEN) for cl_id in CHOSEN}
    text = io.StringIO(newline="")
    text.write(
        f"# Cell Ontology {release}, CC BY 4.0, obofoundry.org/ontology/cl; made by tools/simulated_cell_types.py\n"
    )
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("cl_id", "label", "parents"))
    for cl_id in sorted(CHOSEN, key=ontology.get_term_label):
        above = ancestors[cl_id]
        nearest = above - {distant for near in above for distant in ancestors[near]}
        table.writerow((cl_id, ontology.get_term_label(cl_id), ";".join(sorted(nearest))))
    return text.getvalue()


if __name__ == "__main__":
    TABLE.write_text(table_text(), encoding="utf-8")
