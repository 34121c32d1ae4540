"""Checkpoints of the published PyTorch models, brought into this package's modules. No torch needed.

They are what PyTorch Lightning saved for microsoft/hce-classification and for theislab/scTab: the network under the
prefix ``classifier.`` of the state dict, beside it what training needed (class weights, hierarchy, augmentations), and
the hyper-parameters, which also lie in the run's ``hparams.yaml``. Genes and labels are not there; a store has them.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx

from hce_jax.checkpoint import NORMALISATION
from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.models import MODELS, MLPConfig, TabNetConfig, build_model, split_model
from hce_jax.predictor import ModelCard, Predictor
from hce_jax.runs import epoch_and_score
from hce_jax.store import SideFiles
from hce_jax.torch_file import TorchFile, TorchTensor, open_torch_file
from hce_jax.typing import resolve_precision

_Tree = dict[Any, Any]

_PREFIX = "classifier."
#: An array that only this model has.
_MARKS = {"linear": "weight", "mlp": "linear.weight", "tabnet": "final_mapping.weight"}
#: What lies beside the network: the hierarchy, by name and whether it is transposed, and what only training needed.
_HIERARCHIES = {"child_lookup": False, "child_lookup_transposed": True}
_OF_TRAINING = ("class_weights", "augmentations", "sample_labels")
#: Older versions of scTab subtract this from the expression; in the published models it is absent.
_FEATURE_MEANS = "feature_means"
#: Added to a subtree's probability in the published hierarchical loss.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one of our arrays lies in a published state dict: a shared one under several names."""

    names: tuple[str, ...]
    transposed: bool = False  # kernels are (in, out), where torch stores (out, in)
    dtype: Any = None


def params_from_state_dict(model_name: str, state_dict: Mapping[str, np.ndarray], config: Any) -> _Tree:
    """Return the variables of a model as a nested dictionary, from a published network's state dict.

    Parameters
    ----------
    model_name
        ``linear``, ``mlp`` or ``tabnet``.
    state_dict
        Arrays under torch's names, without the prefix ``classifier.``. Several names of one shared weight may be there.
    config
        The model's config dataclass.

    Returns
    -------
    dict
        Parameters and batch statistics, to be set with ``nnx.replace_by_pure_dict(state, ...)``; layers are counted by
        integers. Kernels are (in, out), where torch stores (out, in).

    Raises
    ------
    KeyError
        If an array of the network is missing.

    Examples
    --------
    >>> from hce_jax.models import LinearConfig
    >>> arrays = {"weight": np.zeros((3, 5)), "bias": np.zeros(3)}
    >>> params_from_state_dict("linear", arrays, LinearConfig())["linear"]["kernel"].shape
    (5, 3)
    """

    def arranged(source: _Source) -> np.ndarray:
        array = np.asarray(state_dict[source.names[0]], source.dtype)
        return array.T if source.transposed else array

    return jax.tree.map(arranged, _SOURCES[model_name](config))


def _linear(config: Any) -> _Tree:
    return {"linear": {"kernel": _Source(("weight",), transposed=True), "bias": _Source(("bias",))}}


def _mlp(config: MLPConfig) -> _Tree:
    # Torch counts linear, batch norm, SiLU and dropout as one sequence.
    return {
        "layers": {i: _dense(f"encoder.{4 * i}") for i in range(config.n_hidden)},
        "norms": {i: _norm(f"encoder.{4 * i + 1}") for i in range(config.n_hidden)},
        "linear": _dense("linear"),
    }


def _tabnet(config: TabNetConfig) -> _Tree:
    steps = range(config.n_steps)
    splitter, *transformers = names = ["encoder.initial_splitter", *(f"encoder.feat_transformers.{s}" for s in steps)]
    return {
        "input_norm": _norm("encoder.initial_bn"),
        "shared_kernels": {
            i: _kernel(
                *(f"{name}.shared.{kind}" for name in names for kind in
                  (f"shared_layers.{i}.weight", f"glu_layers.{i}.fc.weight"))
            )
            for i in range(config.n_shared)
        },
        "splitter": _transformer(splitter, config),
        "transformers": {s: _transformer(name, config) for s, name in enumerate(transformers)},
        "attentions": {
            s: {
                "kernel": _kernel(f"encoder.att_transformers.{s}.fc.weight"),
                "norm": _norm(f"encoder.att_transformers.{s}.bn.bn"),
            }
            for s in steps
        },
        "head": _kernel("final_mapping.weight"),
    }  # fmt: skip


def _transformer(name: str, config: TabNetConfig) -> _Tree:
    own = [f"{name}.specifics.glu_layers.{i}" for i in range(config.n_independent)]
    layers = [f"{name}.shared.glu_layers.{i}" for i in range(config.n_shared)] + own
    return {
        "kernels": {i: _kernel(f"{layer}.fc.weight") for i, layer in enumerate(own)},
        "norms": {i: _norm(f"{layer}.bn.bn") for i, layer in enumerate(layers)},
    }


def _kernel(*names: str) -> _Source:
    return _Source(names, transposed=True)


def _dense(name: str) -> _Tree:
    return {"kernel": _kernel(f"{name}.weight"), "bias": _Source((f"{name}.bias",))}


def _norm(name: str) -> _Tree:
    return {
        "weight": _Source((f"{name}.weight",)),
        "bias": _Source((f"{name}.bias",)),
        "running_mean": _Source((f"{name}.running_mean",)),
        "running_variance": _Source((f"{name}.running_var",)),
        "n_updates": _Source((f"{name}.num_batches_tracked",), dtype=np.int32),
    }


_SOURCES = {"linear": _linear, "mlp": _mlp, "tabnet": _tabnet}


def load_torch_checkpoint(ckpt_path: str | Path, side: SideFiles, hparams_path: str | Path | None = None) -> Predictor:
    """Load a checkpoint of the published PyTorch code.

    Its genes and types are taken to be those of the store, in order: their numbers are checked, and the hierarchy where
    the checkpoint has it.

    Parameters
    ----------
    ckpt_path
        The ``.ckpt`` file.
    side
        Genes, labels and hierarchy of the store that the model was trained on.
    hparams_path
        The run's ``hparams.yaml``. Needed only where the checkpoint has no hyper-parameters of its own and the file
        lies neither beside it nor in the folder above.

    Raises
    ------
    CheckpointError
        If the file cannot be read (:func:`hce_jax.torch_file.open_torch_file`), is not such a checkpoint, lacks an
        array or has one too many or of another shape, has several values for a shared weight, or does not fit the
        store.

    Examples
    --------
    >>> side = open_store("merlin_cxg_2023_05_15_sf-log1p").side  # doctest: +SKIP
    >>> load_torch_checkpoint("val_f1_macro_epoch=1_val_f1_macro=0.802.ckpt", side).card.epoch  # doctest: +SKIP
    1
    """
    path = Path(ckpt_path)
    with open_torch_file(path) as file:
        state_dict = _state_dict(file)
        network = {name.removeprefix(_PREFIX): each for name, each in state_dict.items() if name.startswith(_PREFIX)}
        model_type = _model_type(path, network)
        fields = _hyper_parameters(file, Path(hparams_path) if hparams_path is not None else None)
        config = _model_config(path, model_type, fields)
        _check_sizes(path, fields, side)
        settings = {"model_type": model_type, **vars(config), "precision": "auto"}
        model = nnx.eval_shape(
            lambda: build_model(settings, side.n_genes, side.n_types, nnx.Rngs(0), precision=resolve_precision("auto"))
        )
        state = nnx.state(model)
        sources = _SOURCES[model_type](config)
        _check_names(path, model_type, network, sources, state_dict)
        _check_shapes(path, network, sources, nnx.to_pure_dict(state), side)
        _check_beside(file, state_dict, side)
        arrays = params_from_state_dict(model_type, _read_network(file, network, sources), config)
        card = _card(file, settings, fields, side)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, arrays))
    nnx.update(model, state)
    return Predictor(path, card, side.reachability, *split_model(model))


def published_f1(path: Path) -> float:
    """Return the exact validation macro F1 of a published checkpoint, of which its name has three digits; 0 if unknown.

    Raises
    ------
    CheckpointError
        If the file cannot be read.

    Examples
    --------
    >>> published_f1(Path("val_f1_macro_epoch=1_val_f1_macro=0.802.ckpt"))  # doctest: +SKIP
    0.8023416996002197
    """
    with open_torch_file(path) as file:
        return _scores(file).get("val_f1_macro", 0.0)


def _state_dict(file: TorchFile) -> dict[str, TorchTensor]:
    found = file.content.get("state_dict") if isinstance(file.content, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path} has no state_dict; it is not a checkpoint of PyTorch Lightning")
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, TorchTensor)):
            raise CheckpointError(f"{name} in the state_dict of {file.path} is not a tensor")
    return found


def _model_type(path: Path, network: Collection[str]) -> str:
    for model_type, mark in _MARKS.items():
        if mark in network:
            return model_type
    marks = ", ".join(f"{_PREFIX}{mark} ({model_type})" for model_type, mark in _MARKS.items())
    raise CheckpointError(f"{path} is not a checkpoint of the published models: it has none of {marks}")


# --- hyper-parameters


class _PlainLoader(yaml.SafeLoader):
    """Reads what has a tag that is not YAML's own, such as a Python class, as the text of the tag."""


_PlainLoader.add_constructor(None, lambda loader, node: node.tag)


def _hyper_parameters(file: TorchFile, hparams_path: Path | None) -> dict[str, Any]:
    """Return those of the checkpoint, with those of hparams.yaml where it is given or the checkpoint has none."""
    saved = file.content.get("hyper_parameters")
    saved = saved if isinstance(saved, dict) else {}
    if hparams_path is None:
        if saved:
            return saved
        beside = [folder / "hparams.yaml" for folder in (file.path.parent, file.path.parent.parent)]
        hparams_path = next((path for path in beside if path.is_file()), None)
        if hparams_path is None:
            raise CheckpointError(
                f"{file.path} has no hyper-parameters, and no hparams.yaml lies beside it; name the run's hparams.yaml"
            )
    given = _read_hparams(hparams_path)
    for name, value in saved.items():
        if isinstance(value, bool | int | float | str) and given.get(name, value) != value:
            raise CheckpointError(
                f"{hparams_path} is of another model than {file.path}: {name} is {given[name]!r} in the one and "
                f"{value!r} in the other"
            )
    return {**given, **saved}


def _read_hparams(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(path.read_text(), _PlainLoader)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} has no fields; it is not the hparams.yaml of a run")
    return fields


def _model_config(path: Path, model_type: str, fields: Mapping[str, Any]) -> Any:
    config_class, _ = MODELS[model_type]
    chosen = {}
    for field in dataclasses.fields(config_class):
        if field.name not in fields:
            raise CheckpointError(f"the hyper-parameters of {path} lack {field.name}, which a {model_type} model needs")
        value = chosen[field.name] = fields[field.name]
        kind: Any = field.type
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise CheckpointError(
                f"the hyper-parameter {field.name} of {path} is of type {type(value).__name__}; it must be of type "
                f"{kind.__name__}"
            )
    try:
        return config_class(**chosen)
    except ConfigError as error:
        raise CheckpointError(f"the hyper-parameters of {path} are not usable: {error}") from error


# --- does it fit?


def _check_sizes(path: Path, fields: Mapping[str, Any], side: SideFiles) -> None:
    for name, what, ours in (("gene_dim", "genes", side.n_genes), ("type_dim", "cell types", side.n_types)):
        theirs = fields.get(name, ours)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint {path} has {theirs} {what}, the store {side.path} has {ours}; name the store that it "
                "was trained on"
            )


def _check_names(
    path: Path, model_type: str, network: Collection[str], sources: _Tree, state_dict: Collection[str]
) -> None:
    needed = {name for source in jax.tree.leaves(sources) for name in source.names}
    missing = [f"{_PREFIX}{name}" for name in sorted(needed - {*network})]
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(missing)}, which a {model_type} model of its hyper-parameters needs"
        )
    known = {f"{_PREFIX}{name}" for name in needed} | {*_HIERARCHIES, *_OF_TRAINING, _FEATURE_MEANS}
    unused = sorted({*state_dict} - known)
    if unused:
        raise CheckpointError(
            f"{path} has {_some(unused)}, which a {model_type} model of its hyper-parameters does not use"
        )


def _some(names: Collection[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _check_shapes(
    path: Path, network: Mapping[str, TorchTensor], sources: _Tree, expected: _Tree, side: SideFiles
) -> None:
    def check(source: _Source, ours: jax.ShapeDtypeStruct) -> None:
        shape = ours.shape[::-1] if source.transposed else ours.shape
        for name in source.names:
            if network[name].shape != shape:
                raise CheckpointError(
                    f"{_PREFIX}{name} of {path} has shape {network[name].shape}; with its hyper-parameters, and "
                    f"{side.n_genes} genes and {side.n_types} cell types, it should have {shape}"
                )

    jax.tree.map(check, sources, expected)


def _check_beside(file: TorchFile, state_dict: Mapping[str, TorchTensor], side: SideFiles) -> None:
    """Check what lies beside the network: the same hierarchy as the store's, and nothing that changes the input."""
    for name, transposed in _HIERARCHIES.items():
        if name not in state_dict:
            continue
        if state_dict[name].shape != side.reachability.shape:
            raise CheckpointError(f"{name} of {file.path} is no hierarchy of {side.n_types} cell types")
        matrix = file.array(state_dict[name])
        for upper, lower in np.argwhere((matrix.T if transposed else matrix) != side.reachability):
            raise CheckpointError(
                f"the checkpoint {file.path} has another hierarchy than the store {side.path}: whether "
                f"{side.labels[lower]!r} belongs to {side.labels[upper]!r} differs ({name}); name the store that it "
                "was trained on"
            )
    if _FEATURE_MEANS in state_dict and file.array(state_dict[_FEATURE_MEANS]).any():
        raise CheckpointError(
            f"{file.path} is of an older scTab, which subtracts {_FEATURE_MEANS} from the expression; such a model is "
            "not supported"
        )


def _read_network(file: TorchFile, network: Mapping[str, TorchTensor], sources: _Tree) -> dict[str, np.ndarray]:
    """Read each array under its first name, as float32 or whole numbers; its other names must have the same numbers."""
    arrays = {}
    for source in jax.tree.leaves(sources):
        first, *others = source.names
        array = file.array(network[first])
        for other in others:
            same = network[other] == network[first] or np.array_equal(file.array(network[other]), array)
            if not same:
                raise CheckpointError(
                    f"{file.path} has two values for one shared weight: {_PREFIX}{first} and {_PREFIX}{other} differ"
                )
        arrays[first] = array if source.dtype is not None else array.astype(np.float32)
    return arrays


# --- what it says of itself


def _card(file: TorchFile, settings: dict[str, Any], fields: Mapping[str, Any], side: SideFiles) -> ModelCard:
    hierarchical = fields.get("use_hierarchical_loss", False)  # scTab has no such field, and only the cross entropy
    return ModelCard(
        config=settings,
        gene_ids=side.gene_ids,
        gene_names=side.gene_names,
        labels=side.labels,
        cl_ids=side.cl_ids,
        ontology_release=side.about.get("ontology_release"),
        normalisation=NORMALISATION,
        loss={"use_hierarchical_loss": bool(hierarchical), "epsilon": _EPSILON},
        data_path=str(side.path.absolute()),
        epoch=_count(file, "epoch"),
        step=_count(file, "global_step"),
        scores=_scores(file),
    )


def _count(file: TorchFile, name: str) -> int:
    value = file.content.get(name)
    if not isinstance(value, int):
        raise CheckpointError(f"{file.path} does not say its {name}; it is not a checkpoint of PyTorch Lightning")
    return value


def _scores(file: TorchFile) -> dict[str, float]:
    """Return the validation macro F1, if known: exact from what chose the checkpoint, else of the file's name."""
    epoch = _count(file, "epoch")
    callbacks = file.content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    for kept in (state.get("best_k_models") for state in states if isinstance(state, dict)):
        for name, score in kept.items() if isinstance(kept, dict) else ():
            described = epoch_and_score(PurePath(str(name)).name)
            if described and described[0] == epoch and isinstance(score, TorchTensor) and score.shape == ():
                return {"val_f1_macro": float(file.array(score))}
    described = epoch_and_score(file.path.name)
    return {"val_f1_macro": described[1]} if described and described[0] == epoch else {}
