# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench NAME`: the measured figures, each beside its limit or its peer."""

import argparse
import importlib

# Name -> (module with `add_arguments(parser)` and `run(arguments) -> exit code`, what it measures).
# Imported when asked for: a bench may need the simulator or torch.
BENCHES = {
    "stream": ("nearkv_sim.bench_stream", "the emitted Verilog: beats used of the bus, in cycles"),
    "twin": ("nearkv_sim.bench_twin", "the native card: GB/s a core, beside torch and the memory"),
    "flash": ("nearkv.bench_flash", "pages from the drive into card memory, beside a raw reader"),
    "decode": ("nearkv.bench_decode", "attention with KV on the drive, beside drive, card, peers"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:8} {what}" for name, (_, what) in BENCHES.items())
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see nearkv bench NAME --help")


def run(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(BENCHES[arguments.name][0])
    parser = argparse.ArgumentParser(
        f"nearkv bench {arguments.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments.arguments))
