"""Loading from a server without a copy on the disk, against fetching alone, downloading first, and another streamer.

A server of its own process sends the files of a checkpoint as an S3 bucket, at several rates and latencies; each way of
loading runs in a process of its own, warmed up on a tiny checkpoint. Peak memory is anonymous memory over that before
the load, watched from outside.

    python bench/remote.py
    python bench/remote.py --scale 0.02 --rates 0 --latencies 0.001    # a quick look

`runai-model-streamer` and `runai-model-streamer-s3` are measured where they are installed: they bring tensors into the
memory of the host and quantize nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, shards_of
from goals import Goal, at_most, print_goals
from load_process import QUIET
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result
from shaped_server import BUCKET

BENCH = Path(__file__).resolve().parent
MB, MIB = 1e6, 1 << 20
SCHEME = "quark_mxfp4"
REQUEST_BYTES = 8 << 20
WAYS = {
    "fetch": "fetching, doing nothing",
    "load": "quantload, from the server",
    "download": "download, then quantload",
    "runai": "runai-model-streamer, no quantizing",
}
SWEEP = (1, 2, 4, 8, 16, 32)
SWEEP_RATE, SWEEP_LATENCY = 90e6, 0.05
OVERHEAD_GOAL = 1.05
WARM_UP_SCALE = 0.002


def fetch(url: str, connections: int, into: Path | None = None) -> None:
    """Every file of weights in ranges; its bytes are dropped, or written to a folder."""
    from obstore.store import from_url

    store = from_url(url, client_options={"allow_http": True, "timeout": "1h"})
    sizes = {meta["path"]: meta["size"] for page in store.list() for meta in page}
    starts = ((name, at) for name, size in sizes.items() for at in range(0, size, REQUEST_BYTES))
    ranges = ((name, at, min(at + REQUEST_BYTES, sizes[name])) for name, at in starts)
    lock = threading.Lock()
    files = {name: (into / name).open("wb") for name in sizes} if into is not None else {}

    def work() -> None:
        while True:
            with lock:
                one = next(ranges, None)
            if one is None:
                return
            name, start, stop = one
            for chunk in store.get(name, options={"range": (start, stop)}).stream(min_chunk_size=256 << 10):
                if files:
                    os.pwrite(files[name].fileno(), chunk, start)
                start += len(chunk)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files.values():
        file.close()


def stream_with_runai(url: str, names: list[str]) -> None:
    """Every tensor into memory, one after the other."""
    with importlib.import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files([f"{url}/{name}" for name in names])
        for _, _tensor in streamer.get_tensors():
            pass


def child(way: str, url: str, warm_up: str, names: list[str], connections: int) -> dict[str, Any]:
    """What a process does: warm up, wait for the word, and go its way."""
    from quantload import LoadOptions, load_quantized

    options = LoadOptions(connections=connections)
    load_quantized(warm_up, SCHEME)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path(warm_up).parent) as folder:
        if way == "fetch":
            fetch(url, connections)
        elif way == "runai":
            stream_with_runai(url, names)
        else:
            if way == "download":
                fetch(url, connections, Path(folder))
            report = load_quantized(url if way == "load" else folder, SCHEME, options=options).load_report
            facts = {"final_bytes": report.final_bytes, "predicted_peak_bytes": report.predicted_peak_bytes}
            facts["staging_peak_bytes"] = report.staging_peak_bytes
        facts["seconds"] = time.perf_counter() - start
    return facts


@contextmanager
def serving(folder: Path, rate: float, latency: float, connection_rate: float = 0.0) -> Iterator[str]:
    """The address of a server that sends the files of a folder so."""
    shape = ["--rate", str(rate), "--latency", str(latency), "--connection-rate", str(connection_rate)]
    command = [sys.executable, str(BENCH / "shaped_server.py"), str(folder), *shape]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def sent(address: str) -> dict[str, int]:
    """What the server has sent since this was asked last."""
    with urllib.request.urlopen(f"{address}/-/sent") as answer:
        said: dict[str, int] = json.loads(answer.read())
        return said


def anonymous_bytes(process: int) -> int:
    """Anonymous memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def run(way: str, address: str, warm_up: Path, names: list[str], connections: int) -> dict[str, Any]:
    """One way in a process of its own: seconds, peak memory, bytes and answers that the server sent."""
    environment = {
        **os.environ, **QUIET, "AWS_ENDPOINT": address, "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_CONCURRENCY": str(connections),
    }  # fmt: skip
    told = [way, f"s3://{BUCKET}", str(warm_up), json.dumps(names), str(connections)]
    command = [sys.executable, __file__, "--child", *told]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        while (line := process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"{WAYS[way]}: did not begin")
        sent(address)
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.003):
                peak = max(peak, anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = process.stdout.read()
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{WAYS[way]}: ended with {process.returncode}")
    facts = json.loads(output.splitlines()[-1])
    said = sent(address)
    return {"way": way, **facts, "peak_bytes": peak - before, "sent_bytes": said["bytes"], "answers": said["answers"]}


def measure(options: argparse.Namespace, folder: Path, warm_up: Path) -> dict[str, Any]:
    """Every way at every rate and latency, in turns; then a load with more and more connections."""
    names = [path.name for path in shards_of(folder)]
    ways = [way for way in WAYS if way != "runai" or importlib.util.find_spec("runai_model_streamer")]
    runs = []
    for rate in options.rates:
        for latency in options.latencies:
            with serving(folder, rate, latency) as address:
                for _ in range(1 if 0 < rate < 100 * MB else options.rounds):
                    for way in ways:
                        one = run(way, address, warm_up, names, options.connections)
                        runs.append({"rate": rate, "latency": latency, **one})
                        print(
                            f"{_rate(rate)}, {latency * 1000:.0f} ms, {WAYS[way]}: {one['seconds']:.2f} s", flush=True
                        )
    sweep = []
    with serving(folder, 0, SWEEP_LATENCY, SWEEP_RATE) as address:
        for connections in SWEEP if not options.no_sweep else ():
            sweep.append({"connections": connections, **run("load", address, warm_up, names, connections)})
            print(f"{connections} connections: {sweep[-1]['seconds']:.2f} s", flush=True)
    return {"runs": runs, "sweep": sweep}


def _median(runs: list[dict[str, Any]], field: str) -> float:
    return statistics.median(float(each[field]) for each in runs)


def _of(result: dict[str, Any], rate: float, latency: float, way: str) -> list[dict[str, Any]]:
    return [each for each in result["runs"] if (each["rate"], each["latency"], each["way"]) == (rate, latency, way)]


def _shapes(result: dict[str, Any]) -> list[tuple[float, float]]:
    return list(dict.fromkeys((each["rate"], each["latency"]) for each in result["runs"]))


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """A load against fetching alone at each shape, over-read and memory."""
    goals = []
    for rate, latency in _shapes(result):
        alone = _median(_of(result, rate, latency, "fetch"), "seconds")
        load = _median(_of(result, rate, latency, "load"), "seconds")
        shape = f"{_rate(rate)}, {latency * 1000:.0f} ms"
        name = f"a load <= {OVERHEAD_GOAL:g}x of fetching alone"
        goals.append(at_most(name, shape, load / alone, OVERHEAD_GOAL, "x"))
    loads = [each for each in result["runs"] if each["way"] == "load"]
    read = max(each["sent_bytes"] for each in loads) / result["checkpoint_bytes"]
    over = max(each["peak_bytes"] - each["predicted_peak_bytes"] for each in loads)
    goals.append(at_most("bytes fetched <= 1.05x of the weights", "all loads", read, 1.05, "x"))
    goals.append(at_most("peak <= what was planned", "all loads", over / MIB, 0, " MiB over it"))
    return goals


def _rate(rate: float) -> str:
    return f"{rate / MB:.0f} MB/s" if rate else "no limit"


def render(result: dict[str, Any]) -> str:
    """A row for each rate, latency and way; then the connections."""
    rows = []
    for rate, latency in _shapes(result):
        alone = _median(_of(result, rate, latency, "fetch"), "seconds")
        for way, name in WAYS.items():
            runs = _of(result, rate, latency, way)
            if not runs:
                continue
            seconds, peak = _median(runs, "seconds"), max(each["peak_bytes"] for each in runs)
            rows.append(
                [
                    *(_rate(rate), f"{latency * 1000:.0f} ms", name, f"{seconds:.2f}", f"{seconds / alone:.2f}x"),
                    *(f"{peak / MIB:.0f}", f"{runs[0]['sent_bytes'] / MB:.0f}", f"{runs[0]['answers']:,}"),
                ]
            )
    table = markdown(rows, ("rate", "latency", "way", "s", "of fetching", "peak MiB", "MB sent", "answers"))
    swept = [
        [
            *(str(each["connections"]), f"{each['seconds']:.2f}"),
            *(f"{each['sent_bytes'] / each['seconds'] / MB:.0f}", f"{each['peak_bytes'] / MIB:.0f}"),
        ]
        for each in result["sweep"]
    ]
    title = f"Loads with each connection limited to {SWEEP_RATE / MB:.0f} MB/s, {SWEEP_LATENCY * 1000:.0f} ms away:"
    return "\n\n".join([table, title, markdown(swept, ("connections", "s", "MB/s", "peak MiB"))] if swept else [table])


def main() -> None:
    """Make, serve, load, print the tables and goals, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="dense", help="of bench/checkpoints.py (default dense)")
    parser.add_argument("--scale", type=float, default=0.2, help="of the checkpoint (default 0.2)")
    rates = [50e6, 500e6, 0.0]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="bytes a second; 0: no limit")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.001, 0.05], help="seconds")
    parser.add_argument("--rounds", type=int, default=3, help="at rates of 100 MB/s and more")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--no-sweep", action="store_true", help="leave out loads with more and more connections")
    parser.add_argument("--dir", type=Path, default=WORK_FOLDER, help="where the checkpoint is made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, url, warm_up, names, connections = options.child
        print(json.dumps(child(way, url, warm_up, json.loads(names), int(connections))), flush=True)
        return
    folder = make(options.checkpoint, options.scale, options.dir)
    warm_up = make(options.checkpoint, WARM_UP_SCALE, options.dir)
    machine = describe_machine()
    result = {
        "machine": machine,
        "checkpoint": options.checkpoint,
        "checkpoint_bytes": sum(path.stat().st_size for path in shards_of(folder)),
        "settings": {"of_checkpoint": options.scale, "connections": options.connections, "rounds": options.rounds},
        **measure(options, folder, warm_up),
    }
    print(headline(machine), render(result), sep="\n\n")
    print_goals(goals_of(result))
    reduced = "" if not options.no_sweep and len(_shapes(result)) == 6 else "part"
    print(write_result("remote", result, options.results, reduced))


if __name__ == "__main__":
    main()
