"""A session: all parts in order, each within its time limit. Each part writes its results to the document at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.processes import num_cores

from ..problem import MAIN
from . import concurrent_jobs, device_constants, ncu, plan, report, selection_rule, torch_profiler
from .budget import CONCURRENT, Budget
from .concurrent_jobs import Job, Report
from .output import Output
from .plan import Case
from .subprocesses import python_command, run_command
from .supervisor import GRACE, Supervisor
from .variants import TABLE
from .worker_pool import WorkerPool, absent_variants, wrong_variants

MIN_NCU_SECONDS = 10.0


@dataclass
class SessionOptions:
    """The options of a session."""

    only: list[str]
    minutes: float
    device: str = "cuda"
    variants: list[str] = field(default_factory=lambda: list(TABLE))
    cases: plan.Filter | None = None
    grid: bool = False
    train: Path | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train_arguments: list[str] = field(default_factory=list)


class Session:
    """Runs the parts of a session."""

    def __init__(self, options: SessionOptions, budget: Budget, output: Output) -> None:
        """Prepare.

        Args:
            options: the options.
            budget: the time budget, already running.
            output: the files. The session fills its document.
        """
        self.options, self.budget, self.output = options, budget, output
        self.document = output.document
        self.device = options.device
        self.cases = self._cases()
        self.pools: list[WorkerPool] = []

    def _cases(self) -> list[Case]:
        measure = self.budget.seconds("measure") if "measure" in self.budget.parts else 60.0
        seconds = min(max(measure / 150, 0.15), 1.0)
        cases = plan.timed_cases(self.options.variants, seconds, self.options.grid)
        if asked := self.options.cases:
            cases = [*asked.extra_cases(self.options.variants, seconds), *filter(asked, cases)]
        return self._sized(cases)

    def _sized(self, cases: Sequence[Case]) -> list[Case]:
        return [plan.shrink_for_cpu(c) for c in cases if not c.graph] if self.device == "cpu" else list(cases)

    def run(self) -> None:
        """Run the selected parts."""
        early = self._compile_early()
        self._part("build", self.build)
        self._part("smoke", lambda seconds: self.smoke(seconds, early))
        self._exclusive()
        self._part("ncu", self.ncu)
        self._concurrent()

    def _part(self, name: str, run: Callable[[float], Report]) -> None:
        if name not in self.options.only:
            return
        seconds = self.budget.seconds(name)
        print(f"=== {name} (at most {seconds:.0f} s; {self.budget.left():.0f} s are left)", flush=True)
        begin = self.budget.clock()
        try:
            found = run(seconds)
        except Exception as error:  # the other parts continue
            found = {"problem": f"{type(error).__name__}: {error}"}
        self.document["parts"][name] = {"seconds": self.budget.clock() - begin} | found
        if "problem" in found:
            print(f"PROBLEM: {found['problem']}", flush=True)
        self.changed()

    def changed(self) -> None:
        """Update the selected variants and the files after a new result."""
        self.document["rule"] = selection_rule.choose_all(self.document)
        self.output.changed()

    # Build and smoke checks

    def build(self, seconds: float) -> Report:
        """Compile the ops in a new process, as the first use does, and report the available backends."""
        done = run_command(
            python_command("-m", "gistops.info"), seconds, self.output.logs["build.log"].part("gistops.info")
        )
        rows = re.findall(r"^(cpu|cuda|triton|reference)\s+(yes|no)\s+(.*)$", done.output, re.M)
        available: dict[str, Any] = {
            name: {"available": yes == "yes", "reason": why} for name, yes, why in rows
        }
        found: Report = {"backends": available}
        if done.code != 0:
            how = f"did not end within {seconds:.0f} s" if done.code is None else f"ended with {done.code}"
            found["problem"] = f"`python -m gistops.info` {how}: {done.tail(3)}"
            os.environ["GISTOPS_JIT"] = "0"  # later processes do not compile again
        elif self.device == "cuda" and (
            missing := [n for n in ("cuda", "triton") if not available[n]["available"]]
        ):
            found["problem"] = f"not available: {', '.join(missing)}"
        return found

    def backends(self) -> list[str]:
        """Return the backends to test: those that the build found, or all without a build."""
        names = ["cuda", "triton"] if self.device == "cuda" else ["cpu"]
        built = self.document["parts"].get("build", {}).get("backends", {})
        return [n for n in names if built.get(n, {"available": True})["available"]]

    def _make_pool(self, uses: Callable[[str], bool], processes: int, seconds: float) -> WorkerPool:
        variants = [n for n in self.options.variants if TABLE[n].ours and uses(TABLE[n].backend)]
        smoked, warmed = plan.smoke_cases(variants, self.cases), plan.warm_up_cases(variants, self.cases)
        precisions = dict.fromkeys(case.precision for case in smoked)
        ordered = [case for p in precisions for case in (*smoked, *warmed) if case.precision == p]
        cases, deadline = self._sized(ordered), time.time() + seconds
        self.pools.append(
            WorkerPool(cases, variants, processes, deadline, self.device, self.record_smoke_results)
        )
        return self.pools[-1]

    def _compile_early(self) -> list[Any]:
        """Compile Triton's kernels while the build runs nvcc, which they do not need."""
        if "smoke" not in self.options.only or self.device == "cpu":
            return []
        seconds = sum(self.budget.seconds(p) for p in ("build", "smoke") if p in self.budget.parts)
        processes = max(2, num_cores() * 3 // 4)
        return self._make_pool(lambda backend: backend == "triton", processes, seconds).start()

    def smoke(self, seconds: float, early: list[Any]) -> Report:
        """Check every gistops variant at small odd sizes, and compile Triton's kernels for the measured sizes."""
        processes = max(1, num_cores() // 4)
        late = self._make_pool(lambda backend: backend != "triton" or not early, processes, seconds).start()
        for thread in (*early, *late):
            thread.join()
        self.record_smoke_results()
        results = [r for p in self.pools for r in p.results]
        ran = [r for r in results if r["case"]["kind"] == "smoke"]
        found: Report = {"cases": len(ran), "warmed": len(results) - len(ran)}
        if late_cases := [c for p in self.pools for b in p.supervisors for c in b.skipped]:
            found["late"] = len(late_cases)
            if not ran:
                found["problem"] = f"none was run: {late_cases[0]['reason']}"
        self.document["smoke"] = [
            r | {"variants": {n: f for n, f in r["variants"].items() if "skipped" not in f}} for r in ran
        ]
        if self.document.get("out"):
            wrong = dict.fromkeys(name for names in self.document["out"].values() for name in names)
            found["problem"] = f"wrong: {', '.join(wrong)}"
        return found

    def record_smoke_results(self) -> None:
        """Write the smoke results so far to the document."""
        results = [r for p in self.pools for r in p.results]
        self.document["out"] = wrong_variants(results)
        self.document.setdefault("absent", {}).update(absent_variants(results))
        self._record_problems([problem for p in self.pools for problem in p.problems])
        self.output.changed()

    def _record_problems(self, problems: Sequence[str]) -> None:
        known = self.document.setdefault("problems", [])
        known += [problem for problem in problems if problem not in known]

    # Parts that need the GPU alone

    def _exclusive(self) -> None:
        """Measure constants and cases and profile them, one after another in one worker (more after a crash)."""
        out = self.document.get("out", {})
        wrong = {name for names in out.values() for name in names}
        timed = [case.without(list(out.get(f"{case.precision} {case.kind}", {}))) for case in self.cases]
        cases = {
            "constants": self._sized(
                [Case("bf16", MAIN, "constants", (n,)) for n in device_constants.CONSTANTS]
            ),
            "measure": [case for case in timed if len(case.variants) > 1],
            "profile": plan.profile_cases([n for n in self.options.variants if n not in wrong], self.cases),
        }
        asked = [part for part in cases if part in self.options.only]
        if not asked:
            return
        ends, seconds = {}, 0.0
        for part in asked:
            seconds += self.budget.share(part, asked[0])
            ends[part] = time.time() + max(seconds - GRACE / 2, seconds / 2)
        print(
            f"=== {', '.join(asked)} (at most {seconds:.0f} s; {self.budget.left():.0f} s are left)",
            flush=True,
        )
        # The constants have no deadline of their own: they are few, and the start of the process delays them.
        deadlines = {c.kind: ends[p] for p in asked if p != "constants" for c in cases[p]}
        everything = [case for part in asked for case in cases[part]]
        supervisor = Supervisor(everything, max(ends.values()), lambda: None, self.device, deadlines)
        self._measure(supervisor, {case.kind: part for part in asked for case in cases[part]})

    def _measure(self, supervisor: Supervisor, part_of: dict[str, str]) -> None:
        """Run the cases. Each result is printed and written to the document."""
        num_printed = 0

        def changed() -> None:
            nonlocal num_printed
            for result in supervisor.results[num_printed:]:
                print(report.line(result), flush=True)
                if result["case"]["kind"] != "constants":
                    self.document.setdefault("absent", {}).update(absent_variants([result]))
            num_printed = len(supervisor.results)
            found: dict[str, list[dict[str, Any]]] = {part: [] for part in part_of.values()}
            for result in supervisor.results:
                found[part_of[result["case"]["kind"]]].append(result)
            for part, results in found.items():
                late = sum(part_of[skipped["case"]["kind"]] == part for skipped in supervisor.skipped)
                self.document["parts"][part] = {"done": len(results), "skipped": late}
                if late and not results:
                    self.document["parts"][part]["problem"] = (
                        f"none was run: {supervisor.skipped[-1]['reason']}"
                    )
            self._keep(found)
            self.document["skipped"] = list(supervisor.skipped)
            self._record_problems(supervisor.problems)
            self.changed()

        supervisor.changed = changed
        supervisor.run()
        if supervisor.problems:
            part = "measure" if "measure" in self.document["parts"] else list(part_of.values())[-1]
            self.document["parts"][part]["problem"] = "; ".join(supervisor.problems[:3])

    def _keep(self, found: dict[str, list[dict[str, Any]]]) -> None:
        if "constants" in found:
            entries = [entry for result in found["constants"] for entry in result["variants"].items()]
            self.document["constants"] = dict(entries)
        if "measure" in found:
            self.document["cases"] = found["measure"]
        if "profile" in found:
            self.document["profiles"] = found["profile"]
            self.output.texts["kernels.csv"] = torch_profiler.kernels_csv(found["profile"])

    def ncu(self, seconds: float) -> Report:
        """Run Nsight Compute over the selected and the default variants until the time is up."""
        program = ncu.find()
        if self.device == "cpu":
            return {"not run": "needs a GPU"}
        if program is None or seconds < MIN_NCU_SECONDS:
            return {"not run": "no time was left" if program else "ncu was not found"}
        picks = [
            (self.document.get("rule", {}).get(f"bf16 {kind}", {}).get("winner"), kind)
            for kind in ("loss", "forward")
        ]
        wanted = [*picks, ("cuda", "step"), ("triton", "step")]
        begin = time.time()
        runs: dict[str, Any] = {}
        for variant, kind in dict.fromkeys((v, k) for v, k in wanted if v in self.options.variants):
            left = seconds - (time.time() - begin)
            if left < MIN_NCU_SECONDS:
                break
            text, runs[f"{variant} {kind}"] = ncu.profile(
                program, variant, kind, MAIN, left, self.output.scratch / f"ncu-{len(runs)}.log"
            )
            self.output.texts["ncu.csv"] = self.output.texts.get("ncu.csv", "") + text
        return {"runs": runs}

    # Parts that share the GPU

    def _concurrent(self) -> None:
        asked = [part for part in CONCURRENT if part in self.options.only]
        if not asked:
            return
        print(f"=== {', '.join(asked)}, concurrently (at most {self.budget.left():.0f} s)", flush=True)
        left, backends = self.budget.left, self.backends()
        jobs: list[Job] = []
        if "train" in asked:
            jobs.append(("train", "models", self._train))
        if "test" in asked:
            jobs += concurrent_jobs.pytest_jobs(self.device, backends, left, self.output.logs["tests.log"])
        if "sanitize" in asked:
            program = concurrent_jobs.find_sanitizer()
            if program is None or self.device == "cpu":
                why = "needs a GPU" if self.device == "cpu" else "compute-sanitizer was not found"
                self.document["parts"]["sanitize"] = {"not run": why}
            else:
                logs = self.output.logs["sanitize.log"]
                jobs += concurrent_jobs.sanitizer_jobs(program, backends, left, logs)
        concurrent_jobs.run_concurrently(jobs, self.document, self.changed)

    def _train(self) -> Report:
        self.output.runs = concurrent_jobs.RUNS
        options, log = self.options, self.output.scratch / "train.log"
        return concurrent_jobs.run_training(
            options.train, options.seeds, self.device, options.train_arguments, self.budget.left(), log
        )
