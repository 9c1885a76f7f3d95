"""Published parameter counts, FLOPs against what XLA counts, and bytes against what JAX really places."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as configs
from lm.config import Config, Train
from lm.data import Data, SentencePiece, Stdlib
from lm.describe import describe
from lm.errors import UserError
from lm.mesh import Mesh, make_mesh
from lm.models import (
    GPT2,
    T5,
    Albert,
    Bart,
    Bert,
    Gemma2,
    Llama,
    MaskedLMAndPair,
    Mixtral,
    Model,
    Qwen3Moe,
    Roberta,
    Transformer,
)
from lm.models.base import abstract
from lm.models.cost import FlopsPerToken, Row, count, count_active, flops_per_token
from lm.nn.compute import Compute
from lm.objectives import CausalLM, Denoising, MaskedLM, Objective, Seq2Seq, SpanCorruption
from lm.optim import Adafactor, AdamW, Muon
from lm.training.memory import device_bytes
from lm.training.setup import Setup
from lm.training.state import State

RECIPE = """
from lm.config import Config, Train
from lm.data import Data, SentencePiece, Stdlib
from lm.mesh import Mesh
from lm.models import GPT2, Llama
from lm.nn.position import Rope
from lm.objectives import CausalLM
from lm.optim import AdamW

config = Config(
    model={model},
    data=Data(
        path="corpus",
        sources={{"stdlib": Stdlib()}},
        tokenizer=SentencePiece(vocab_size=300),
        seq_len=1024,
        batch_size=8,
    ),
    objective=CausalLM(),
    optim=AdamW(lr=0.003),
    train=Train(steps=50),
)
"""
GPT2_SMALL = "GPT2()"
LLAMA3_8B = """Llama(
        vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336, rope=Rope(theta=500_000.0)
    )"""
CONFIG = Config(
    model=Llama(vocab_size=302, d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=22),
    data=Data(
        path="corpus", sources={"stdlib": Stdlib()}, tokenizer=SentencePiece(vocab_size=300), seq_len=28, batch_size=8
    ),
    objective=CausalLM(),
    optim=AdamW(lr=0.003),
    train=Train(steps=50),
    mesh=Mesh(data=2, fsdp=2, tensor=2),
)


@pytest.fixture
def recipe(tmp_path):
    def write(model: str) -> str:
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.format(model=model))
        return str(path)

    return write


def facts(text: str) -> dict[str, str]:
    """The lines below the values: name -> value."""
    lines = [line.strip().partition("  ") for line in text.partition("\n\n")[2].splitlines()]
    return {name: value.strip() for name, _, value in lines}


def values(text: str) -> dict[str, list[str]]:
    """The lines above: path -> value and origin."""
    rows = [line.split(maxsplit=1) for line in text.partition("\n\n")[0].splitlines()]
    return {path: [part.strip() for part in rest.rsplit("  ", 1)] for path, rest in rows}


@pytest.mark.parametrize(("model", "parameters"), [(GPT2_SMALL, "124,439,808"), (LLAMA3_8B, "8,030,261,248")])
def test_parameters_are_those_published(recipe, model, parameters):
    assert facts(describe(recipe(model)))["parameters"] == parameters


def test_costs_of_gpt2_by_hand(recipe):
    found = facts(describe(recipe(GPT2_SMALL), ["train.steps=7"]))
    matmul = 124_439_808 - 1024 * 768  # all but the position table
    attention = 12 * 12 * 768 * 1024  # 12 L (H K) S
    assert found["tokens per step"] == "8,192"
    assert found["tokens in all"] == "57,344"
    assert found["FLOPs per token"] == (
        f"{6 * matmul + attention:.4g} (full attention), {6 * matmul + attention / 2:.4g} (causal)"
    )
    assert found["mesh"] == "1 device(s): one device"
    assert found["params"] == found["gradients"] == f"{124_439_808 * 4 / 2**20:.2f} MiB"
    assert found["bytes per device"].startswith(f"{124_439_808 * 16 / 2**30:.2f} GiB")


# Wide enough for matmuls to be nearly all of the work: XLA counts norms, softmaxes and activations too.
V, D, S = 512, 256, 64
WIDTHS = dict(vocab_size=V, d_model=D, n_layers=2, n_heads=4)
ENCODER = WIDTHS | dict(d_ff=640, max_positions=66)
MASKED = MaskedLM(mask_id=500, cls_id=501, sep_id=502, vocab_size=500)
PAIRS = MaskedLM(mask_id=500, cls_id=501, sep_id=502, vocab_size=500, pair="sop")
EXPERTS = WIDTHS | dict(n_kv_heads=2, d_ff=320, n_experts=4, capacity_factor=1.0)
COUNTED = {
    "gpt2": (GPT2(**WIDTHS, max_positions=S), CausalLM()),
    "llama": (Llama(**WIDTHS, n_kv_heads=2, d_ff=640), CausalLM()),
    "gemma2": (Gemma2(**WIDTHS, n_kv_heads=2, head_dim=32, d_ff=640, window=16), CausalLM()),
    "mixtral": (Mixtral(**EXPERTS, top_k=2), CausalLM()),
    "bert": (Bert(**ENCODER, task=MaskedLMAndPair()), PAIRS),
    "roberta": (Roberta(**ENCODER), MASKED),
    "albert": (Albert(**ENCODER | dict(n_layers=3), d_embed=64), MASKED),
    "t5": (
        T5(**WIDTHS, head_dim=48, d_ff=640, dropout=0.0, n_encoder_layers=3),
        SpanCorruption(first_sentinel_id=511, n_sentinels=12),
    ),
    "bart": (Bart(**ENCODER, dropout=0.0), Denoising(mask_id=511)),
    "transformer": (Transformer(**WIDTHS, d_ff=640, dropout=0.0), Seq2Seq(max_source=40, max_target=24)),
}


def counted(model: Model, objective: Objective) -> FlopsPerToken:
    return flops_per_token(model, abstract(model).infos, S, objective.row(S))


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_what_xla_counts(name):
    model, objective = COUNTED[name]
    # XLA counts the body of a loop once, whatever its trips, and what is recomputed as work.
    unrolled = dataclasses.replace(model, compute=Compute(scan=False, remat="none", query_block=0))
    parts = abstract(unrolled)

    def loss(params, batch):
        return objective.loss(nnx.merge(parts.graphdef, params), batch, dtype=jnp.float32, key=None).total

    found = jax.jit(jax.grad(loss)).lower(parts.params, objective.features(2, S)).cost_analysis()["flops"] / (2 * S)
    expected = counted(model, objective).full
    if isinstance(model, Mixtral):  # tokens to experts and back by matmuls: 5 products of [S, k S] with [k S, D]
        expected += model.n_layers * 5 * 2 * model.top_k * S * D
    assert 1.0 <= found / expected < 1.02


def test_flops_of_a_mixture_are_those_of_a_dense_model_as_wide_as_its_active_experts():
    mixture, dense = Mixtral(**EXPERTS, top_k=3), Llama(**WIDTHS, n_kv_heads=2, d_ff=3 * 320)
    routers = 6 * 2 * D * 4  # both layers' [D, E]
    row = CausalLM().row(S)
    for a, b in zip(counted(mixture, CausalLM()), counted(dense, CausalLM())):
        assert a == pytest.approx(b + routers, rel=1e-12)
    infos = abstract(mixture).infos
    assert count(infos) - count_active(mixture, infos) == 2 * 3 * D * 320  # one expert of four, in two layers
    assert row == Row(length=S, predicted=S)


def test_only_causal_attention_is_halved():
    attention = 12 * 2 * D * S  # of two layers over the square, per token
    for name, (model, objective) in COUNTED.items():
        flops = counted(model, objective)
        if model.family == "encoder":
            assert flops.causal == flops.full, name
        elif name in ("gpt2", "llama", "mixtral"):
            assert flops.full - flops.causal == attention / 2, name
    full, causal = counted(*COUNTED["transformer"])
    assert full - causal == pytest.approx(12 * 2 * D * 24 * 24 / S / 2, rel=1e-9)  # the decoder's own alone


def test_active_parameters_leave_dense_layers_and_routers_whole():
    model = Qwen3Moe(
        vocab_size=V, d_model=D, n_layers=3, n_heads=4, head_dim=32, d_ff=640, dense=(1,), n_experts=8, top_k=2,
        expert_d_ff=96,
    )  # fmt: skip
    infos = abstract(model).infos
    assert count(infos) - count_active(model, infos) == 2 * 6 * 3 * D * 96


def test_what_is_printed_of_encoders_and_mixtures():
    masked, mixture = facts(describe("bert_base")), facts(describe("mixtral_8x7b"))
    assert "causal" not in masked["FLOPs per token"] and "full" not in masked["FLOPs in all"]
    assert mixture["parameters"] == "46,702,792,704, 12,879,925,248 active for a token"
    assert mixture["mesh"] == "256 device(s): fsdp=32 x expert=8"


def test_fsdp_divides_the_bytes_by_the_devices(recipe):
    one, eight = (facts(describe(recipe(LLAMA3_8B), (), n)) for n in (1, 8))
    norms = (2 * 32 + 1) * 4096  # replicated
    assert one["params"] == f"{8_030_261_248 * 4 / 2**30:.2f} GiB"
    assert eight["params"] == f"{((8_030_261_248 - norms) / 8 + norms) * 4 / 2**30:.2f} GiB"
    assert eight["mesh"] == "8 device(s): fsdp=8"


def check_bytes(config: Config, state: State) -> None:
    """`device_bytes` against the sum of the shards that each device holds."""

    def placed(tree, device):
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device]
        return sum(s.data.nbytes for s in shards)

    expected = device_bytes(config, len(jax.devices()))
    for device in jax.devices():
        assert placed(state.params, device) == expected.params == expected.gradients
        assert placed(state.opt, device) == expected.optimizer
        assert placed(state.ema, device) == expected.ema
    assert expected.total == 2 * expected.params + expected.optimizer + expected.ema


@pytest.mark.parametrize(
    "optim", [AdamW(lr=0.1, ema_decay=0.9), Muon(lr=0.1), Adafactor(lr=0.1, min_dim_size_to_factor=5)]
)
def test_bytes_per_device_are_what_jax_places_there(optim):
    config = dataclasses.replace(CONFIG, optim=optim)
    abstract = Setup.make(config, make_mesh(config.mesh)).abstract_state
    check_bytes(config, jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract))


def test_bytes_per_device_are_those_of_a_run_that_begins():
    model = dataclasses.replace(CONFIG.model, n_layers=1)  # compiling `init` takes seconds, most of it per parameter
    config = dataclasses.replace(CONFIG, model=model, optim=AdamW(lr=0.1, ema_decay=0.9))
    check_bytes(config, Setup.make(config, make_mesh(config.mesh)).init())


def test_the_moving_average_is_counted_where_it_is_kept(recipe):
    without, kept = (facts(describe(recipe(GPT2_SMALL), o)) for o in ([], ["optim.ema_decay=0.99"]))
    assert "ema" not in without
    assert kept["ema"] == kept["params"]


def test_every_value_stands_with_its_origin(recipe):
    found = values(describe(recipe(GPT2_SMALL), ["optim.lr=0.25", "mesh.data=2"]))
    assert found["model"] == ["GPT2", "recipe"]
    assert found["model.vocab_size"] == ["50257", "default"]
    assert found["train.steps"] == ["50", "recipe"]
    assert found["optim.lr"] == ["0.25", "command line"]
    assert found["optim.schedule"] == ["Cosine", "default"]
    assert found["mesh.data"] == ["2", "command line"]
    assert found["data.sources.stdlib"] == ["Stdlib", "recipe"]


def test_devices_default_to_the_fewest_that_the_mesh_fits(recipe):
    path = recipe("GPT2(vocab_size=50258)")
    assert facts(describe(path, ["mesh.tensor=2"]))["mesh"] == "2 device(s): tensor=2"
    assert facts(describe(path, ["mesh=Mesh(data=2, fsdp=4)"]))["mesh"] == "8 device(s): data=2 x fsdp=4"


@pytest.mark.parametrize(
    ("overrides", "n_devices", "message"),
    [
        ([], 0, "--devices: expected at least 1, got 0"),
        ([], 3, "data.batch_size: 8 is not divisible by the 3 data shards"),
        (["mesh.tensor=2", "model.vocab_size=50258"], 3, "mesh: fsdp=-1 x tensor=2 does not fit 3 devices"),
        (["mesh.tensor=2"], 2, "embed.table: axis 'vocab' of size 50257 is not divisible by mesh axis tensor=2"),
        (
            ["mesh.tensor=8", "model.vocab_size=50264"],
            8,
            "axis 'kv_heads' of size 12 is not divisible by mesh axis tensor=8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(recipe, overrides, n_devices, message):
    with pytest.raises(UserError) as e:
        describe(recipe(GPT2_SMALL), overrides, n_devices)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_the_folder_of_a_run_is_described_by_what_it_stored(tmp_path):
    resolved = configs.resolved(CONFIG, ["optim.lr=0.25"])
    (tmp_path / "config.json").write_text(resolved.to_json())
    found = values(describe(str(tmp_path), ["train.seed=3"]))
    assert found["optim.lr"] == ["0.25", "command line"]
    assert found["train.seed"] == ["3", "command line"]
    assert found["train.steps"] == ["50", "recipe"]
    assert facts(describe(str(tmp_path)))["mesh"] == "8 device(s): data=2 x fsdp=2 x tensor=2"


def test_describe_touches_no_device_and_loads_no_tensorflow(recipe):
    code = f"""
import json, sys
from lm import cli
try:
    cli.main(["describe", {recipe(LLAMA3_8B)!r}, "--devices", "256", "data.batch_size=256"])
except SystemExit as e:
    from jax._src import xla_bridge
    print(json.dumps([e.code, list(xla_bridge._backends), "tensorflow" in sys.modules]))
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, [], False]
    assert "256 device(s): fsdp=256" in done.stdout
