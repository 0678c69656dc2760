"""Read a text of more than a million tokens over the ring with three numbers hidden in it, then ask for each of them and for a story.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 launch/examples/million.py [CHARACTERS] [KEY.SUB=VALUE ...]

CHARACTERS: how much of the King James Bible to read; all of it by default. Prints a line of JSON a question; `later`: median seconds
from one piece of the answer to the next, from the first on.
"""

import gzip
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path

from ringctx import Ring
from ringctx.config import load
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.planting import hide
from ringctx.tools.eval.watch import anonymous
from ringctx.tools.eval.wordings import WORDINGS

HERE = Path(__file__).parent
NEEDLES = (("plain", 0.1), ("diary", 0.5), ("notice", 0.9))
STORY = "Tell the story of the flood at length, in your own words."

characters, overrides = (int(sys.argv[1]), sys.argv[2:]) if sys.argv[1:] else (None, [])
config = load(HERE.parent.parent / "configs" / "smollm2_million.yaml", ("generation.max_new_tokens=64", *overrides))
text = gzip.decompress((HERE.parent / "documents" / "kjv.txt.gz").read_bytes()).decode()[:characters]
draw = random.Random(7)
numbers = {name: str(draw.randint(10_000, 99_999)) for name, _ in NEEDLES}
text = hide(tuple((depth, WORDINGS[name].needle.format(of="", number=numbers[name])) for name, depth in NEEDLES), text)

with Ring.from_env(timeout=config.ring.timeout) as ring, anonymous() as memory:
    engine = Engine.load(config, ring)
    steps = 0

    def layer(number: int) -> None:
        global steps
        steps += number == 0
        if number == 0 and steps % 25 == 1 and ring.rank == 0:
            print(f"chunk {steps}", file=sys.stderr, flush=True)

    reading = engine.read(engine.prompts.opening(text), Listener(layer=layer))
    read = {
        "tokens": len(reading.tokens),
        "seconds": reading.seconds,
        "mapped": reading.cache.mapped_bytes,
        "sent": dict(ring.traffic.sent),
    }
    asked = [
        (depth, numbers[name], WORDINGS[name].question.format(of=""), WORDINGS[name].beginning.format(of="")) for name, depth in NEEDLES
    ]
    for depth, number, question, beginning in [*asked, (None, None, STORY, "")]:
        begun = engine.tokenizer(beginning, add_special_tokens=False).input_ids
        pieces: list[float] = []
        told = Listener(text=lambda _, pieces=pieces: pieces.append(time.perf_counter()))
        answer = engine.answer(reading, [*reading.tokens, *engine.prompts.ending(text, question), *begun], told)
        later = statistics.median(b - a for a, b in itertools.pairwise(pieces)) if len(pieces) > 1 else None
        facts = {"depth": depth, "number": number, "later": later, **answer.json(), "anonymous": memory.bytes, "read": read}
        print(f"[rank {ring.rank}] {json.dumps(facts)}", flush=True)
