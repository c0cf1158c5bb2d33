"""Decoding and prefill beside transformers and llama.cpp: what `trinity bench decode` measures, of recipes too.

    python bench/decode.py [MODEL] [--engine NAME ...] [--repeats 5] [--prefill 512 4096 32768] [--text FILE]
    python bench/decode.py lab256 --engine trinity-float32 --engine trinity-int8 --dense --json out.json
    python bench/decode.py nano --engine llama-q8_0 --engine llama-q4_0 --prefill 512

MODEL is a recipe, with seeded random weights and a context long enough for every prompt, or a model folder. Without
--engine all are measured that are installed and fit the memory together. Each engine lives in a process of its own,
which tells its peak memory; they take turns, and medians are compared, since machines are shared. Decoding gives each
of --batch sequences one token a step, greedily, after 128 tokens of prompt; prefill reads one prompt from an empty
cache up to its last logits. transformers takes whichever of its experts' implementations was fastest in a try before.
The machine's memory bandwidth is that of a read of one large buffer; the share of it is above one where a large cache
holds what every token needs.

--dense sets a dense model of the same number of parameters beside each kind of ours: same width, layers and attention,
a wider feed-forward, random weights. The published claim for Trinity is 2 to 3 times the speed. What --drafts bring
only a trained model tells: greedy answers of random weights fall into loops, in which drafts are taken.

llama.cpp comes with: CXXFLAGS='-fno-dse -fno-tree-dse' pip install llama-cpp-python gguf. The flags matter on
processors with AMX: gcc 12 takes the setting up of its tiles for dead code, and prompts in 8 and 4 bits end in a
segmentation fault. (Rows as narrow as those of `debug` are wrong on AMX all the same: see --text.) Beside it threads
wait awake, without which it decodes a tenth of the tokens. Where another program holds a core, waiting awake makes
llama.cpp slower by a hundred times.
"""

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from trinity.base.errors import TrinityError, UsageError
from trinity.bench.figures import PACKAGES, memory_needed
from trinity.bench.subject import TEXT_ROW, Side, Subject
from trinity.ckpt.opened import find_model
from trinity.cli.bench import add_measures, measure
from trinity.config.model import ModelConfig
from trinity.engine.device import device_named
from trinity.kernels.heap import available_bytes
from trinity.plan.params import count_parameters
from trinity.recipes.table import recipe

ENGINES = ["trinity-float32", "trinity-bfloat16", "trinity-int8", "trinity-int4", "transformers-float32",
           "llama-float32", "llama-q8_0", "llama-q4_0"]  # fmt: skip
ENGINES_OF_A_GPU = ["trinity-bfloat16", "trinity-float8", "trinity-int8", "trinity-int4", "transformers-bfloat16"]


def subject_of(options: argparse.Namespace) -> Subject:
    if Path(options.model).is_dir():
        found = find_model(options.model)
        return Subject(name=found.name, config=found.config, folder=found.folder)
    options.prefill = options.prefill or [512, 4096, 32768]
    config = replace(recipe(options.model).model, max_position_embeddings=2 * max(*options.prefill, TEXT_ROW))
    return Subject(name=options.model, config=config)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """All layers dense, and as many parameters, to within 32 hidden units a layer."""
    flat = replace(config, num_dense_layers=config.num_hidden_layers)
    without = count_parameters(flat).total - count_parameters(flat).dense
    a_unit = 3 * config.hidden_size * config.num_hidden_layers
    hidden = (count_parameters(config).total - without) / a_unit
    return replace(flat, intermediate_size=32 * max(1, round(hidden / 32)))


def sides_of(options: argparse.Namespace, subject: Subject) -> list[Side]:
    """Those asked for; else all that are installed, as long as they fit the memory together."""
    known = ENGINES if options.device == "cpu" else ENGINES_OF_A_GPU
    asked = [name for name in known if any(name.startswith(begin) for begin in options.engine or [""])]
    sides: list[Side] = []
    for engine, precision in (name.split("-") for name in asked):
        added = [Side(engine=engine, precision=precision, subject=subject)]
        if options.dense and engine == "trinity":
            twin = Subject(name=f"dense-{subject.name}", config=dense_twin(subject.config))
            added += [Side(engine=engine, precision=precision, subject=twin, label="dense")]
        here = all(find_spec(module) for module in PACKAGES.get(engine, []))
        fits = memory_needed([*sides, *added]) < (available_bytes(torch.device(options.device)) or 2**62)
        if options.engine or (here and fits):
            sides += added
        else:
            why = "not enough memory" if here else "not installed"
            print(f"{engine}-{precision} is left out: {why}.", file=sys.stderr)
    if not sides:
        raise UsageError(f"No engine is called '{' or '.join(options.engine)}'.", f"Known: {', '.join(known)}.")
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="lab256")
    parser.add_argument("--engine", action="append", metavar="NAME", help=f"or how one begins: {', '.join(ENGINES)}")
    parser.add_argument("--dense", action="store_true", help="also a dense model of as many parameters")
    add_measures(parser, repeats=5)
    options = parser.parse_args()
    try:
        options.device = device_named(options.device).type
        measure(sides_of(options, subject_of(options)), options)
    except TrinityError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
