"""`adaptive-merge fit` and `validate`: LightningCLI over a suite, a module made of parts and a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import Namespace, class_from_function
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_merge import upstream
from adaptive_merge.callbacks import watchers
from adaptive_merge.callbacks.guard.guard import Select
from adaptive_merge.cli.configs import layered
from adaptive_merge.cli.hints import explain
from adaptive_merge.cli.session import TRAINER_DEFAULTS, GuardMode, Session, quiet
from adaptive_merge.cli.slurm import Slurm
from adaptive_merge.cli.stopped import Place, answering
from adaptive_merge.cli.trainer import check_trainer, refusal, restoring
from adaptive_merge.data import TaskStream
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import AdaptiveMergeError, InputError, printable
from adaptive_merge.files import strict_json
from adaptive_merge.limits import VALUES, check_names, check_nesting
from adaptive_merge.runs.checkpoint_io import check_writable
from adaptive_merge.runs.folder import IfExists, SaveConfig, check_name
from adaptive_merge.suites import Suite, load_suite

__all__ = ["AdaptiveMergeCLI", "fit", "run", "validate"]

STARTED = time.perf_counter()
_LOAD = jsonargparse.get_loader("yaml")


def run(arguments: list[str]) -> dict[str, Any]:
    """Run `fit` or `validate`, named in the arguments; the results of `fit`, or view/task/quantity → its value.

    Raises:
        AdaptiveMergeError: what the user has to mend.
    """
    with answering() as place, ExitStack() as held:
        return AdaptiveMergeCLI(args=arguments, held=held, place=place).results


def fit(arguments: list[str]) -> None:
    """Adapt and score a merge; leave a run folder."""
    run(["fit", *arguments])


def validate(arguments: list[str]) -> None:
    """Score a view of a merge; nothing is written. `--json` prints for machines what else is a table."""
    plain = [argument for argument in arguments if argument != "--json"]
    scores = run(["validate", *plain])
    Console().print_json(strict_json(scores)) if plain != arguments else Console().print(_table(scores))


def _table(scores: Mapping[str, float]) -> Table:
    """A row a task, a column a quantity, in percent; what a task has none of is said to be missing."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        _, *task, quantity = key.split("/")
        rows.setdefault("/".join(task), {})[quantity] = value
    average = rows.pop("", {})
    names = list(dict.fromkeys(name for row in (*rows.values(), average) for name in row))
    view = Table("task", *(f"{name}, %" for name in names))
    for column in view.columns[1:]:
        column.justify = "right"
    average = {
        name: sum(row[name] for row in rows.values()) / len(rows)
        for name in names
        if all(name in row for row in rows.values())
    } | average
    for task, row in {**rows, "average": average}.items():
        view.add_row(escape(printable(task)), *(f"{100 * row[name]:.1f}" if name in row else "none" for name in names))
    return view


class AdaptiveMergeCLI(LightningCLI):
    """A suite, a module made of parts, a stream over the suite's images, and a run folder."""

    def __init__(
        self, args: list[str], run: bool = True, held: ExitStack | None = None, place: Place | None = None
    ) -> None:
        quiet()
        _stay_local()
        self._run, self._parsers = run, []
        self._session: Session | None = None
        self.results: dict[str, Any] = {}  # once it has ended
        self._held, self._place = held or ExitStack(), place or Place()
        try:
            self._build(args, run)
        except Exception as error:
            if self._session:
                self._session.undo()
            path = self.settings.ckpt_path if self._session else None
            if path and restoring(error):
                raise InputError(
                    f"{path}: this run cannot go on from it ({type(error).__name__}: {error}); the file is damaged or "
                    "of another program: give a last.ckpt of these settings, or start anew (--run.if_exists overwrite)"
                ) from error
            raise

    def _build(self, args: list[str], run: bool) -> None:
        super().__init__(
            AdaptiveMerge,
            TaskStream,
            save_config_callback=SaveConfig if run else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "description": "Adapt a merge of experts on unlabelled test batches.",
            },
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes no abbreviations, kept to know the options."""
        self._parsers.append(super().init_parser(**{"allow_abbrev": False} | kwargs))
        return self._parsers[-1]

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; names of recipes become files, and a mistake is explained by the nearest name."""
        try:
            super().parse_arguments(parser, layered(args))
        except jsonargparse.ArgumentError as error:
            options = {option for one in self._parsers for option in upstream.options_of(one)}
            raise InputError(explain(error, options)) from error
        settings = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        for room in ("suite", "model", "data", "trainer", "run", "slurm"):
            if not isinstance(settings[room], Namespace):
                raise InputError(f"{room}: expected a mapping of settings, got {settings[room]!r:.60}")
        if not 0 <= settings.seed_everything < 2**32:
            raise InputError(f"--seed_everything {settings.seed_everything}: give a whole number from 0 to {2**32 - 1}")
        if settings.run.name:
            settings.run.name = settings.run.name.replace("{recipe}", _label(settings))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, as Lightning has them."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The suite and the run folder; the suite's parts reach module and stream as objects."""
        # Whether images are looked for is not the user's to say, see `load_run`.
        skip = {"lazy"} if self._run else set()
        parser.add_class_arguments(class_from_function(load_suite, Suite), "suite", skip=skip)
        for part in ("task_vectors", "backbone", "heads"):
            parser.link_arguments(
                "suite",
                f"model.{part}",
                compute_fn=lambda suite, part=part: getattr(suite, part),
                apply_on="instantiate",
            )
        parser.link_arguments("suite", "data.images", compute_fn=lambda suite: suite.images, apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments(
            "data", "model.unseen", compute_fn=lambda stream: list(stream.protocol.unseen), apply_on="instantiate"
        )
        parser.add_argument("--run.root", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--run.name",
            type=str | None,
            default=None,
            help="folder of this run; `{recipe}` in it stands for the default: the recipe and, where they are others "
            "than usual, protocol and corruption, such as `adamerging-holdout`",
        )
        parser.add_argument(
            "--run.if_exists",
            type=IfExists,
            default="refuse",
            help="what to do with a folder that holds a run: nothing, go on from its last checkpoint, or replace it",
        )
        parser.add_argument(
            "--run.guard",
            type=GuardMode,
            default="stop",
            help="what to do where the merge collapses: restore the best state and end, warn, or do not look",
        )
        parser.add_argument(
            "--run.select",
            type=Select,
            default="last",
            help="the step to keep: the last, or the best by agreement with the experts, by JS divergence to them or "
            "by entropy, none of which needs labels; `oracle` uses labels, and the run is marked everywhere",
        )
        parser.add_argument("--run.report", type=bool, default=True, help="write report.html at the end of `fit`")
        parser.add_class_arguments(Slurm, "slurm")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the hyper-parameters in a checkpoint choose the configuration here; we do not."""

    @property
    def settings(self) -> Namespace:
        """The parsed configuration of the chosen subcommand."""
        return self.config[self.subcommand] if self.subcommand else self.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.run.root) / self.run_name

    @property
    def run_name(self) -> str:
        """Its folder within the root: what the user says, or what the run is called by itself."""
        return self.settings.run.name or _label(self.settings)

    def before_instantiate_classes(self) -> None:
        """Point loggers and checkpoints at the run folder, after checking that nothing in it gets lost."""
        settings = self.settings
        if self.subcommand:
            check_trainer(settings.trainer)
        if self.subcommand == "validate":
            settings.verbose = False  # Lightning's table has the means once for each task
        if self.subcommand != "fit":
            return
        settings.weights_only = True
        check_names(self.folder.parts[1:], "folder of a run", "--run.name")
        check_name(settings.run.root, self.run_name)
        if settings.model.cache:
            check_writable(Path(settings.model.cache))
        self._session = Session(self.folder, settings.run.if_exists, self._held, STARTED)
        self._place.folder = self.folder
        settings.trainer.default_root_dir = settings.trainer.default_root_dir or str(self.folder)
        settings.ckpt_path = self._session.claim(settings.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build everything; what the parts of a configuration refuse is said of their setting."""
        try:
            super().instantiate_classes()
        except AdaptiveMergeError:
            raise
        except Exception as error:
            message = refusal(error, self.settings)
            if message is None:
                raise
            raise InputError(message) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer; for `fit` with a CSV log and the last checkpoint always on, beside what the user asks for."""
        if self.subcommand != "fit":
            return super().instantiate_trainer(logger=False, **kwargs)
        asked = self.config_init[self.subcommand].trainer
        given = asked.callbacks if isinstance(asked.callbacks, list) else [asked.callbacks] if asked.callbacks else []
        trainer = super().instantiate_trainer(
            logger=self._session.loggers(asked.logger),
            callbacks=watchers(given, progress=asked.enable_progress_bar is not False),
            **kwargs,
        )
        self._session.equip(trainer, self.settings.run.guard, self.settings.run.select)
        self._place.launcher = trainer.strategy.launcher
        return trainer

    def before_fit(self) -> None:
        """Refuse what cannot run, before anything is written."""
        self._session.begin(self.trainer, self.model, self.datamodule, self.settings.trainer)

    def after_fit(self) -> None:
        """Keep what was learned, score the views, write `results.json`, print the table."""
        suite = self._get(self.config_init, "suite")
        self.results = self._session.finish(
            self.trainer,
            self.model,
            self.datamodule,
            notes=suite.notes,
            trigger=suite.trigger,
            report=self.settings.run.report,
        )

    def after_validate(self) -> None:
        """Keep the scores of the view that was validated."""
        self.results = {key: float(value) for key, value in self.trainer.callback_metrics.items()}


def _label(settings: Namespace) -> str:
    """What a run is called by itself, so that one of another protocol or corruption does not meet it in its folder."""
    protocol, corruption = settings.data.protocol, settings.data.corruption
    parts = [protocol.class_path.rpartition(".")[2].lower()] if protocol else []
    parts += [corruption.init_args.kind, str(corruption.init_args.severity)] if corruption else []
    return "-".join([settings.model.recipe, *(part for part in parts if part != "transductive")])


def _stay_local() -> None:
    """Settings are read from files and arguments, within limits; Lightning has switched on addresses of all kinds."""
    jsonargparse.set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    jsonargparse.set_loader("yaml", _bounded, (yaml.YAMLError, ValueError, RecursionError))


def _bounded(text: str) -> Any:
    """A value of the command line, or a file that a configuration names."""
    if text.count("[") + text.count("{") > VALUES:
        raise InputError("refused, a setting of too many parts")
    content = _LOAD(text)
    check_nesting(content, "a setting")
    return content
