"""LoRA of HF peft: names, scalings and patterns against `deptjax`'s LoRA, which has one rank and one alpha.

Stored as `base_model.model.{module}.lora_A.weight` (R, in) and `.lora_B.weight` (out, R); the update is
`scaling * x A^T B^T`, scaling alpha / R, or alpha / sqrt(R) with `use_rslora` (arXiv 2312.03732). Modules may differ
in rank and alpha (`rank_pattern`, `alpha_pattern`), and layers may have none (`layers_to_transform`). All that is held
exactly: a smaller rank is filled up with zeros, another scaling goes into B, a layer without LoRA gets zeros. The
tensors say which modules have LoRA, so `target_modules` is not interpreted.

GPT-2's query, key and value are one module there. Read, each of the three has the module's A and its own rows of B;
written, the ranks of those that have LoRA stand side by side: A stacked, B a matrix of blocks.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deptjax.errors import UserError
from deptjax.interop.adapters import (
    Adapter,
    AdapterConfig,
    Projection,
    projections,
    refuse_others,
    take,
)
from deptjax.interop.array_files import floats
from deptjax.interop.names import Path, entries
from deptjax.models.backbone import Backbone
from deptjax.models.layout import with_layout
from deptjax.typing import Tree

PREFIX = "base_model.model."
_SITE = "site"
_KNOWN = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules"
    " exclude_modules lora_alpha lora_dropout bias use_rslora init_lora_weights layers_to_transform layers_pattern"
    " rank_pattern alpha_pattern megatron_config megatron_core loftq_config eva_config qalora_group_size"
    " ensure_weight_tying runtime_config"
).split()
_OFF = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "repeated layers",
    "lora_bias": "a bias in B",
    "target_parameters": "LoRA of bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "corda_config": "CorDA, which changes the backbone's own weights,",
    "lora_ga_config": "LoRA-GA, which changes the backbone's own weights,",
}
_STORED = "fan_in_fan_out"
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the backbone's weights alone


def read_lora(config: AdapterConfig, tensors: dict[str, np.ndarray], where: str, backbone: Backbone) -> Adapter:
    """Returns LoRA with the factors of a LORA adapter, lora_a (in, R) and lora_b (R, out) beside each projection."""
    if _kernels_are_in_out(backbone):  # peft puts this right by itself where it is not
        config.only([*_KNOWN, _STORED], _OFF)
    else:
        config.only(_KNOWN, {**_OFF, _STORED: "kernels stored transposed"})
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        config.refuse(
            "init_lora_weights",
            "it may change the backbone's own weights, which the adapter does not hold; convert the adapter with "
            "peft's path_initial_model_for_weight_conversion",
        )
    places = projections(backbone.config)
    stored = {p: tuple(f"{PREFIX}{p.module}.lora_{letter}.weight" for letter in "AB") for p in places}
    refuse_others(tensors, [name for names in stored.values() for name in names], where)
    there = [p for p in places if any(name in tensors for name in stored[p])]
    if not there:
        raise UserError(f"{where}: it holds no LoRA of this backbone's projections; give the adapter of this backbone")
    ranks = {p: _pattern(config, "rank_pattern", p, config.whole("r")) for p in there}
    rank = max(int(value) for value in ranks.values())
    alpha, plain = config.number("lora_alpha", 8), rank == config.whole("r") and not config.get("use_rslora", False)
    base = _scaling(config, alpha, config.whole("r")) or 1.0
    sites = sorted({p.site for p in there})
    leaves = {}
    for place in (p for p in places if p.site in sites):
        a, b = np.zeros((place.features_in, rank), np.float32), np.zeros((rank, place.features_out), np.float32)
        if place in there:
            r = int(ranks[place])
            name_a, name_b = stored[place]
            a[:, :r] = floats(take(tensors, name_a, (r, place.features_in), where), f"{where}: tensor '{name_a}'").T
            index, count = place.part
            whole = take(tensors, name_b, (place.features_out * count, r), where)
            b[:r] = floats(np.split(whole, count)[index], f"{where}: tensor '{name_b}'").T
            factor = _scaling(config, _pattern(config, "alpha_pattern", place, alpha), r) / base
            if factor != 1.0:
                b *= np.float32(factor)
        leaves[(*place.path, _SITE, "lora_a")], leaves[(*place.path, _SITE, "lora_b")] = a, b
    alpha = alpha if plain and alpha else base * rank  # a product of a quotient may miss it by the last bit
    targets = f"^({'|'.join(map(re.escape, sites))})$"
    method = {"method": "lora", "rank": rank, "alpha": alpha, "targets": targets}
    return Adapter(method, {"backbone": unflatten_dict(leaves)})


def _scaling(config: AdapterConfig, alpha: float, rank: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora", False) else rank)


def _pattern(config: AdapterConfig, field: str, place: Projection, default: float) -> float:
    """Returns the value of the first pattern that matches the end of a module's name, as peft looks it up."""
    patterns = config.get(field, {})
    if not isinstance(patterns, dict):
        config.refuse(field, "expected an object")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", place.module)
        except re.error as error:
            config.refuse(field, f"'{pattern}' is not a regular expression ({error})")
        if matches:
            whole = field != "rank_pattern" or (isinstance(value, int) and value > 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not whole:
                config.refuse(field, f"'{pattern}' has {value!r}, expected a number")
            return value
    return default


def lora_files(method: dict[str, Any], trainable: Tree, backbone: Backbone) -> tuple[dict[str, Any], Tree]:
    """Returns the fields of the config, and the tensors, of a LORA adapter."""
    leaves = flatten_dict(with_layout(trainable["backbone"], scan_layers=False))
    filled: dict[str, list[Projection]] = {}
    for place in projections(backbone.config):
        if (*place.path, _SITE, "lora_a") in leaves:
            filled.setdefault(place.module, []).append(place)
    tensors, wider = {}, {}
    for module, places in filled.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = _side_by_side(
            places, leaves
        )
        if len(places) > 1:
            wider[module.rpartition(".")[2]] = len(places)
    alpha = method["alpha"]
    fields = {
        "peft_type": "LORA",
        "r": method["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": _targets(list(filled), backbone),
        "lora_dropout": 0.0,
        "bias": "none",
        _STORED: _kernels_are_in_out(backbone),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {module: times * method["rank"] for module, times in wider.items()},
        "alpha_pattern": {module: times * alpha for module, times in wider.items()},
    }
    return fields, tensors


def _side_by_side(places: list[Projection], leaves: dict[Path, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (n R, in) and B (out, n R) of the module that these n projections are parts of."""
    factors = {
        leaf: [np.asarray(leaves[(*place.path, _SITE, leaf)], np.float32).T for place in places]
        for leaf in ("lora_a", "lora_b")
    }
    a, out, rank = np.concatenate(factors["lora_a"]), places[0].features_out, factors["lora_b"][0].shape[1]
    b = np.zeros((out * places[0].part[1], len(a)), np.float32)
    for i, (place, block) in enumerate(zip(places, factors["lora_b"], strict=True)):
        row = place.part[0] * out
        b[row : row + out, i * rank : (i + 1) * rank] = block
    return a, b


def _kernels_are_in_out(backbone: Backbone) -> bool:
    """Returns whether the family's files hold kernels as (in, out), which peft calls fan_in_fan_out."""
    return not any(entry.transpose for entry in entries(backbone.config) if "layers_0" in entry.path)


def _targets(modules: list[str], backbone: Backbone) -> list[str]:
    """Returns the last words of the modules' names where these choose exactly them, else their whole names."""
    ends = sorted({module.rpartition(".")[2] for module in modules})
    every = [entry.name.removesuffix(".weight") for entry in entries(backbone.config)]
    chosen = {name for name in every if name.rpartition(".")[2] in ends}
    return ends if chosen == set(modules) else modules
