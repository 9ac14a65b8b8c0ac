"""Makes t5x_scalable.npz: a random scanned T5 of T5X's scalable_t5, and its logits.

    PYTHONPATH=CHECKOUT_OF_T5X python tests/goldens/make_t5x_goldens.py

The file holds every parameter under its dotted T5X name (`weight:NAME`), a padded batch (`source`, `targets`) and the
float32 `logits` (B, U, V) of T5X's own network. All layers of a stack have one position bias, as T5 has it.
`t5x_ckpt.tgz` beside it holds two checkpoints that T5X wrote itself, of t5x/examples/t5, plain and sharded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Writes the file."""
    from t5x.examples.scalable_t5 import network  # type: ignore[import-not-found]

    sizes = {"vocab_size": 53, "emb_dim": 12, "num_heads": 3, "head_dim": 5, "mlp_dim": 17}
    config = network.T5Config(
        **sizes, num_encoder_layers=2, num_decoder_layers=3, mlp_activations=("gelu", "linear"), scan_layers=True
    )
    source = np.array([[5, 6, 7, 8, 40], [9, 10, 1, 0, 0]], np.int32)
    targets = np.array([[4, 5, 6, 1], [7, 8, 9, 50]], np.int32)
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    module = network.Transformer(config)
    params = module.init(jax.random.key(0), source, inputs, targets, enable_dropout=False)["params"]
    random = np.random.default_rng(0)

    def leaf(path: Any, value: Any) -> np.ndarray:
        values = random.standard_normal(value.shape).astype(np.float32)
        names = [part.key for part in path]
        if names[-1] == "scale":
            return 1 + 0.1 * values
        if names[-1] == "rel_embedding":
            return np.ascontiguousarray(np.broadcast_to(values[:, :1], values.shape))
        return values * np.float32(1 if names[-1] == "embedding" else value.shape[0] ** -0.5)

    params = jax.tree_util.tree_map_with_path(leaf, params)
    logits = module.apply({"params": params}, source, inputs, targets, enable_dropout=False)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    weights = {"weight:" + ".".join(part.key for part in path): value for path, value in flat}
    np.savez_compressed(FOLDER / "t5x_scalable.npz", source=source, targets=targets, logits=logits, **weights)


if __name__ == "__main__":
    main()
