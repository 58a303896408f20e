"""Find the files with the questions of tasks, and say which training data were not searched for them."""

from collections.abc import Iterator
from pathlib import Path

from llmkit.config.data import EvaluationFile, TableFormat, TaskData
from llmkit.config.defaults import TASKS
from llmkit.config.schema import Config
from llmkit.data.rows import read_report
from llmkit.data.splits import read_manifest
from llmkit.errors import DataError, UserError
from llmkit.files import file_sha256
from llmkit.storage.locate import Located, locate
from llmkit.storage.run import read_about, read_run_config
from llmkit.tasks.documents import FORMATS, find_files
from llmkit.tasks.task import Task, find_task, read_task


def name_question_files(config: Config) -> Config:
    """Return a config whose data.decontaminate.files has the files of its tasks too.

    Raises UserError for a task whose questions are no files, and DataError for one whose files are not there.
    """
    evals = config.data.decontaminate
    if evals is None or not evals.tasks:
        return config
    found = list(evals.files)
    for one in evals.tasks:
        one = TaskData(task=one) if isinstance(one, str) else one
        file = find_task(one.task, TASKS)
        task = read_task(file) if file else None
        if task is None or not has_files(task):
            what, fix = "names a task whose questions are no files here", "download them, and give a task file for them"
            raise config.error("data.decontaminate.tasks", what, got=one.task, fix=fix)
        data = Path(one.data) if one.data else None
        how = {name: getattr(task.dataset_kwargs, name) for name in TableFormat.model_fields}
        try:
            files = find_files(task, task.asked_split, file.parent, data)
        except DataError as error:
            error.fix = f"data.decontaminate.tasks: [{{task: {one.task}, data: FOLDER OR FILE}}]"
            raise
        for path in files:
            entry = EvaluationFile(path=str(path), **how) if TableFormat(**how) != TableFormat() else str(path)
            found += [entry] if entry not in found else []
    data = config.data.model_copy(update={"decontaminate": evals.model_copy(update={"files": found})})
    return config.model_copy(update={"data": data})


def has_files(task: Task) -> bool:
    """Return whether a task's records are files, as opposed to a data set on the hub."""
    return task.dataset_path in FORMATS or Path(task.dataset_path).exists()


def checksums(task: Task, home: Path, data: Path | None) -> list[str]:
    """Return the SHA-256 of each file with the questions of a task; of a data set on the hub, none."""
    if data is None and not has_files(task):
        return []
    return sorted(file_sha256(path) for path in find_files(task, task.asked_split, home, data))


def searched_by_run(located: Located) -> Iterator[tuple[Path, set[str]]]:
    """Yield (run, checksums of the evaluation files that its data were searched for) of a MODEL's run, and of the runs
    that it started from.
    """
    seen: set[Path] = set()
    while located.run_dir is not None and located.run_dir.resolve() not in seen:
        seen.add(located.run_dir.resolve())
        run, config = located.run_dir, read_run_config(located.run_dir)
        data = config["data"]
        try:
            if data["kind"] == "corpus":
                report = read_manifest(Path(data["dir"]))
            else:
                report = read_report(run / "data" / read_about(run)["data_fingerprint"])
            yield run, set(report.get("searched", []))
        except (UserError, KeyError):  # the data are gone by now: what they were searched for is not known
            yield run, set()
        if not config["init_from"]:
            return
        try:
            located = locate(config["init_from"], check=False)
        except UserError:
            return


def not_searched(located: Located, tasks: dict[str, list[str]]) -> Iterator[str]:
    """Yield a line for each run behind a MODEL whose data were not searched for the questions of some tasks.

    tasks  name -> `checksums`
    """
    for run, searched in searched_by_run(located):
        if missing := [name for name, files in tasks.items() if files and not searched.issuperset(files)]:
            names = ", ".join(missing)
            yield f"the data of {run} were not searched for the questions of {names}: see data.decontaminate.tasks"
