"""One run that is stopped and killed at random moments ends as the undisturbed one, bit for bit."""

import csv
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import ranks
import runs

from kl_f8_train.run_dir import list_checkpoints

pytestmark = pytest.mark.slow
STOPS, LENGTH = 50, 200
EXTRA = (f"stop_iteration={100 + LENGTH}", "checkpoint.every=2", "data.workers=1", "global_batch=2")
LINE = f" of {100 + LENGTH} |"  # after each iteration
KINDS = {  # signals, and the exit codes they may lead to: by our handler, or before there is one
    "TERM": {143, -signal.SIGTERM},
    "INT": {130, 1},
    "USR1": {138, -signal.SIGUSR1},
    "TERM TERM": {143, -signal.SIGTERM},
    "KILL": {-signal.SIGKILL},
}


def test_fifty_signals_and_kills_change_nothing(tmp_path: Path) -> None:
    """The moments are drawn from the start of an attempt to its second or third iteration."""
    runs.make_shards(tmp_path)
    runs.make_weights(tmp_path / "model.ckpt")
    (whole,) = ranks.start(tmp_path, "undisturbed", *EXTRA)
    whole.wait_for("init: ")  # the first process also waits for the server's imports
    began = time.perf_counter()
    whole.wait_for("batch: ")
    starting = time.perf_counter() - began
    whole.wait_for(LINE)
    began = time.perf_counter()
    whole.wait_for(LINE, times=11)
    iteration = (time.perf_counter() - began) / 10
    ranks.finish([whole])

    draw = random.Random(0)
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(STOPS):
        kind = draw.choice(list(KINDS))
        (run,) = ranks.start(tmp_path, "disturbed", *EXTRA)
        after = draw.choice(("start", "batch: ", "batch: ", LINE, LINE))
        if after != "start":
            run.wait_for(after)
        run.process.join(draw.uniform(0.0, starting if after == "start" else iteration))
        for name in kind.split():
            run.send(signal.Signals[f"SIG{name}"])
            run.process.join(0.02)
        code = run.end(30)  # seconds: the longest a launcher may have to wait
        seen[kind, code] += 1
        assert code in KINDS[kind], (kind, run.output)
        assert code != 1 or run.output.endswith("KeyboardInterrupt\n"), run.output
    print(dict(seen))
    assert seen.total() == STOPS
    for kind, codes in KINDS.items():
        assert any(seen[kind, code] for code in codes if code != 1), (kind, seen)
    reached = runs.final_state(tmp_path, "disturbed").iteration
    assert reached is not None
    assert reached < 100 + LENGTH, "the run ended before the signals did"

    ranks.finish(ranks.start(tmp_path, "disturbed", *EXTRA))
    runs.assert_same_state(
        runs.final_state(tmp_path, "disturbed"), runs.final_state(tmp_path, "undisturbed")
    )
    with (tmp_path / "disturbed" / "metrics.csv").open() as file:
        rows = [int(row["iteration"]) for row in csv.DictReader(file)]
    assert rows == list(range(101, 101 + LENGTH))
    left = sorted((tmp_path / "disturbed" / "checkpoints").iterdir())
    assert left == sorted(list_checkpoints(tmp_path / "disturbed"))
