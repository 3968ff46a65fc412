"""The support matrix says what the registries can do, and what is read of real checkpoints is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stored_tensors
from quantload.kernels.registry import PLATFORMS
from quantload.schemes.listing import list_read_only, list_schemes
from quantload.schemes.registry import ENTRIES
from quantload.schemes.stored.read import READERS
from quantload.schemes.support import METHODS, merged, support_matrix
from quantload.schemes.support_tables import HARDWARE, markdown, online, support_tables
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"
TESTED = sorted(
    path.parent
    for path in DATA.glob("*/*/config.json")
    if json.loads(path.read_text()).get("quantization_config") is not None
)
ROWS = {row.name: row for row in support_matrix()}


@pytest.mark.parametrize("folder", TESTED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_what_real_checkpoints_hold_is_listed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    method = quantization["quant_method"]
    weights = stored_tensors.read(quantization, load_file(folder / "model.safetensors"), **config).weights
    assert weights
    for weight in weights.values():
        kind = "experts" if ".experts" in weight.name else "linear"
        assert kind in READERS[method].layers
        rows = [row for row in ROWS.values() if row.formats.get(kind) == weight.format]
        assert any(kind in row.read_from.get(method, ()) for row in rows)


def test_every_tool_has_a_real_checkpoint_but_modelopt() -> None:
    configs = (json.loads((folder / "config.json").read_text()) for folder in TESTED)
    methods = {config["quantization_config"]["quant_method"] for config in configs}
    assert methods == {*METHODS} - {"modelopt"}


def test_rows_are_the_schemes_and_then_what_is_only_read() -> None:
    online = [row.name for row in ROWS.values() if row.online]
    assert online == [entry.name for entry in ENTRIES if entry.linear or entry.experts]
    assert [row.name for row in merged(support_matrix())][len(online) :] == [
        *("int4_group*", "int4_group0_*", "int4_group0_f32", "int8_group*")
    ]


def test_layers_and_tools() -> None:
    both = ("linear", "experts")
    assert ROWS["quark_mxfp4"].read_from == {
        "quark": both,
        "compressed-tensors": both,
        "mxfp4": ("experts",),
        "fp8": both,
    }
    assert ROWS["mxfp6_e3m2"].read_from == {"quark": both}
    assert ROWS["experts_int8"].read_from == {"quark": ("experts",), "compressed-tensors": ("experts",)}
    assert ROWS["quark_int4fp8_moe"].read_from == {}
    assert ROWS["nvfp4"].read_from == {"compressed-tensors": both, "modelopt": both}
    own = {"quantload": both}
    assert ROWS["nvfp4"].written_as == {"compressed-tensors": both, "modelopt": both, **own}
    assert ROWS["int4_per_group"].written_as == {"compressed-tensors": both, **own}
    assert ROWS["quark_mxfp4"].written_as == {"quark": both, "compressed-tensors": both, "mxfp4": ("experts",), **own}
    assert all(ROWS[name].written_as == own for name in ("nl4", "mxfp4_rows", "quark_int4fp8_moe"))
    assert ROWS["int4_group0_f32"].written_as == {}
    assert all(row.kept for row in ROWS.values())


def test_activations_and_scale_modes() -> None:
    assert ROWS["mxfp6_e2m3"].activations == ("mxfp6_e2m3", "fp8 static")
    assert ROWS["int4_per_group"].activations == ()
    assert ROWS["mxfp8"].scale_modes == ("default", "mse")
    assert ROWS["fp8_per_block"].scale_modes == ("default",)


def test_json_has_the_kernels_of_every_platform_by_kind() -> None:
    rows = {row["name"]: row for row in [*list_schemes("cpu"), *list_read_only()]}
    platforms = rows["fp8_per_channel"]["platforms"]
    assert list(platforms) == list(PLATFORMS)
    assert platforms["sm_90"]["linear"]["linear"] == ["scaled_mm", "triton_w8a8", "triton", "torch"]
    assert platforms["sm_90"]["experts"]["experts"] == ["triton_w8a8", "triton", "torch"]
    assert "experts" not in platforms["sm_90"]["linear"]
    assert rows["none"]["formats"] == rows["none"]["read_from"] == {}
    assert rows["none"]["convert_to"] == {}
    assert rows["int4_group64_bf16"]["read_from"] == {method: ["linear", "experts"] for method in _INT4_TOOLS}
    assert rows["nvfp4"]["requantize_only"] is False
    json.dumps(list(rows.values()))


_INT4_TOOLS = ("compressed-tensors", "awq", "gptq")


def test_tables_answer_what_a_user_asks() -> None:
    _, checkpoints, kernels = support_tables()
    by_name = {row[0]: dict(zip(checkpoints.header, row, strict=True)) for row in checkpoints.rows}
    assert by_name["mxfp6_e2m3"]["quark"] == "read, write"
    assert by_name["int4_per_group"]["compressed-tensors"] == "read, write"
    assert by_name["int4_per_group"]["quark"] == "-"
    assert by_name["quark_mxfp4"]["mxfp4"] == "read, write experts"
    served = {name: dict(zip(kernels.header, row, strict=True)) for row in kernels.rows for name in row[0].split(", ")}
    assert served["mxfp6_e2m3"]["gfx950 (MI350X)"] == "triton"
    assert served["quark_mxfp4"]["gfx950 (MI350X)"] == "aiter, else triton_w4a4"
    assert served["fp8_per_tensor"]["sm_90 (H100)"] == "scaled_mm / triton_w8a8"
    assert served["nvfp4"]["sm_100 (B200)"] == "triton_w4a4"
    assert served["nvfp4"]["gfx950 (MI350X)"] == "triton"
    assert set(HARDWARE) == set(PLATFORMS) - {"cpu"}


def test_the_short_table_has_every_scheme_that_quantizes_once() -> None:
    table = online()
    names = [name for row in table.rows for name in row[0].split(", ")]
    assert sorted(names) == sorted(entry.name for entry in ENTRIES if entry.linear or entry.experts)
    bits = {name: row[1] for row in table.rows for name in row[0].split(", ")}
    assert (bits["quark_mxfp4"], bits["quark_int4fp8_moe"], bits["mxfp8"]) == ("4", "4 and 8", "8")
    assert "`experts_int8` is for experts only." in table.notes[0]


def test_markdown_has_a_line_a_row() -> None:
    for table in (*support_tables(), online()):
        lines = markdown(table).split("\n\n")[0].splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert {line.count("|") for line in lines} == {len(table.header) + 1}
