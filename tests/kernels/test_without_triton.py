"""Where Triton is not installed, as on CPUs, everything imports and works."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDDEN = "import sys; sys.modules['triton'] = None\n"
"""What makes `triton` a package that cannot be found or imported."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_model_loads_and_answers() -> None:
    out = run(
        "import torch\n"
        "from quantload import load_quantized\n"
        "from quantload.cli import DEMO_MODEL\n"
        "model = load_quantized(DEMO_MODEL, 'quark_mxfp4', device='cpu')\n"
        "tokens = model.generate(torch.arange(8)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)\n"
        "print(len(model.load_report.layers), tuple(tokens.shape))\n"
    )
    assert out.splitlines()[-1] == "35 (1, 12)"


def test_the_schemes_are_listed() -> None:
    out = run(
        "sys.argv = ['quantload', 'schemes', '--json', '--device', 'cpu']\nfrom quantload.cli import main\nmain()"
    )
    assert '"quark_mxfp4"' in out


def test_every_module_imports_but_the_bodies_of_gpu_kernels() -> None:
    out = run(
        "import importlib, os, quantload\n"
        "(top,) = quantload.__path__\n"
        "for folder, _, files in os.walk(top, followlinks=True):\n"
        "    package = ['quantload', *os.path.relpath(folder, top).replace('.', '').split(os.sep)]\n"
        "    for name in (file.removesuffix('.py') for file in files if file.endswith('.py') and file[0] != '_'):\n"
        "        module = '.'.join([part for part in package if part] + [name])\n"
        "        try:\n"
        "            importlib.import_module(module)\n"
        "        except ImportError as error:\n"
        "            assert error.name == 'triton' or module.startswith('quantload.engines.'), (module, error)\n"
        "            print(*(['' if error.name != 'triton' else module]))\n"
        "        else:\n"
        "            assert '.gpu.jit.' not in module, module\n"
        "assert 'quantload.kernels.gpu.matmuls' in sys.modules\n"
    )
    needing = out.split()
    assert all(name.startswith("quantload.kernels.gpu.") for name in needing), needing
