"""P-tuning's networks against torch's, as HF peft has them, and against numpy; where they start."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import PTuning
from deptjax.methods.base import Texts, input_parameters
from deptjax.methods.p_tuning import lstm, mlp
from deptjax.training.state import count_parameters

M, D, H = 6, 11, 5


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("reverse", [False, True])
def test_lstm_is_the_recurrence(reverse: bool) -> None:
    x, w_input, w_state, bias = (draw(*shape) for shape in ((M, D), (D, 4 * H), (H, 4 * H), (4 * H,)))
    state, cell, wanted = np.zeros(H), np.zeros(H), np.zeros((M, H))
    for t in range(M)[:: -1 if reverse else 1]:
        i, f, g, o = np.split(np.float64(x[t]) @ w_input + state @ w_state + bias, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        wanted[t] = state = sigmoid(o) * np.tanh(cell)
    got = lstm(jnp.asarray(x), tuple(map(jnp.asarray, (w_input, w_state, bias))), reverse)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_mlp_has_a_relu_between_its_layers() -> None:
    x, w1, b1, w2, b2 = (draw(*shape, seed=i) for i, shape in enumerate(((M, D), (D, H), (H,), (H, D), (D,))))
    wanted = np.maximum(np.float64(x) @ w1 + b1, 0) @ w2 + b2
    got = mlp(jnp.asarray(x), (jnp.asarray(w1), jnp.asarray(b1)), (jnp.asarray(w2), jnp.asarray(b2)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def peft_encoder(network: str) -> Any:
    """Returns peft's prompt encoder with random weights."""
    import torch
    from peft import PromptEncoderConfig
    from peft.tuners.p_tuning import PromptEncoder

    torch.manual_seed(3)
    config = PromptEncoderConfig(
        num_virtual_tokens=M,
        token_dim=D,
        num_transformer_submodules=1,
        encoder_reparameterization_type=network.upper(),
        encoder_hidden_size=H,
        encoder_dropout=0.0,
    )
    return PromptEncoder(config).eval()


def of_peft(encoder: Any, network: str) -> dict[str, np.ndarray]:
    """Returns peft's weights by our names."""
    state = {name: leaf.detach().numpy() for name, leaf in encoder.state_dict().items()}
    ours = {"prompt": state["embedding.weight"]}
    for i, at in enumerate((0, 2, 4) if network == "mlp" else (0, 2), start=1):
        ours |= {f"w{i}": state[f"mlp_head.{at}.weight"].T, f"b{i}": state[f"mlp_head.{at}.bias"]}
    for layer in range(0 if network == "mlp" else 2):
        for way, ending in (("on", ""), ("back", "_reverse")):
            name, end = f"lstm{layer}_{way}", f"l{layer}{ending}"
            ours[f"{name}_input"] = state[f"lstm_head.weight_ih_{end}"].T
            ours[f"{name}_state"] = state[f"lstm_head.weight_hh_{end}"].T
            ours[f"{name}_bias"] = state[f"lstm_head.bias_ih_{end}"] + state[f"lstm_head.bias_hh_{end}"]
    return ours


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_the_prompt_is_pefts(network: str) -> None:
    import torch

    encoder = peft_encoder(network)
    params, method = of_peft(encoder, network), PTuning(prompt_length=M, network=network, hidden=H)
    first = input_parameters(method, jax.random.key(0), D)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in params.items()}
    wanted = encoder(torch.arange(M)[None])[0].detach().numpy()
    embeds = jnp.zeros((2, 3, D))
    prompt, same = method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(same, embeds)
    _, folded = method.fold({"input": params})
    np.testing.assert_allclose(folded["input"]["prompt"], wanted, rtol=0, atol=1e-6)


def test_layers_start_as_torchs_and_vectors_from_a_normal() -> None:
    first = input_parameters(PTuning(prompt_length=97, network="lstm", hidden=41), jax.random.key(0), 101)
    assert np.std(first["prompt"]) == pytest.approx(1.0, rel=0.05)
    limits = {"w1": 2 * 41, "b1": 2 * 41, "w2": 2 * 41, "lstm0_on_input": 41}
    for name, fan_in in limits.items():
        limit = 1 / np.sqrt(fan_in)
        assert np.abs(first[name]).max() <= limit
        assert np.std(first[name]) == pytest.approx(limit / np.sqrt(3), rel=0.15)
    # The sum of torch's two biases, each of them uniform within the limit.
    assert np.std(first["lstm1_back_bias"]) == pytest.approx(np.sqrt(2 / 3 / 41), rel=0.15)
    assert np.abs(first["lstm1_back_bias"]).max() <= 2 / np.sqrt(41)


def test_parameter_counts() -> None:
    shapes = jax.eval_shape(lambda: input_parameters(PTuning(), jax.random.key(0), 768))
    assert count_parameters(shapes) == 20 * 768 + 3 * (768 * 768 + 768)
    assert PTuning().resolve(768).hidden == 768


def test_mistakes_and_groups() -> None:
    with pytest.raises(UserError, match=r"p_tuning: network 'lstn' is not lstm or mlp\..*Did you mean 'lstm'\?"):
        PTuning(network="lstn")
    with pytest.raises(UserError, match="p_tuning: hidden is 0; it must be at least 1"):
        PTuning(hidden=0)
    groups = PTuning().groups({"input": {"prompt": 0, "w1": 0, "lstm0_on_bias": 0}})
    assert groups == {"input": {"prompt": "prompt", "w1": "low_rank", "lstm0_on_bias": "low_rank"}}
    assert PTuning().learning_rates(0.3).keys() == {"prompt", "low_rank"}
