"""Two jobs that save to one place at the same instant, as a requeued job may do that overlaps with its predecessor."""

import subprocess
from pathlib import Path

from prepared_python import prepared_python

JOB = """
import sys
import torch
import lentando.torch as lt

job = int(sys.argv[1])
lt.init()
model = torch.nn.Linear(64, 64)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, period=2)
print("ready", flush=True)
for line in sys.stdin:
    action, folder = line.split()
    try:
        if action == "save":
            lt.save(folder, optimizer, extra={"job": job})
            print("saved", flush=True)
        else:
            print(lt.load(folder, optimizer)["job"], flush=True)
    except lt.CheckpointError as error:
        print("refused" if "another job is saving to" in str(error) else error, flush=True)
"""
ATTEMPTS = 8


class Job:
    """A job of one rank that saves and loads when asked to."""

    def __init__(self, number: int) -> None:
        command = [*prepared_python("lentando.torch"), "-c", JOB, str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, action: str, folder: Path) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{action} {folder}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def test_one_of_two_jobs_that_save_at_once_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    jobs = [Job(number) for number in range(2)]
    try:
        assert [job.answer() for job in jobs] == ["ready", "ready"]
        for attempt in range(ATTEMPTS):
            folder = tmp_path / f"{attempt}"
            for job in jobs:
                job.ask("save", folder)
            answers = [job.answer() for job in jobs]
            assert set(answers) <= {"saved", "refused"}, answers
            assert "saved" in answers
            jobs[0].ask("load", folder)
            winner = int(jobs[0].answer())
            assert answers[winner] == "saved"
            files = sorted(path.name for path in folder.iterdir())
            assert len(files) == 3, files  # the manifest, the rank's part and the shared part: nothing is left over
    finally:
        for job in jobs:
            job.process.communicate(timeout=30)
