"""Train, evaluate or predict: python main.py --config configs/digits.py --workdir runs/digits [--mode MODE]."""

from absl import flags

from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.programs import evaluate, predict, processes, train

_USAGE = __doc__.split(": ", 1)[1]
MODES = {"train": train.train, "evaluate": evaluate.evaluate, "predict": predict.predict}

_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(MODES),
    "Train (or go on with the run in workdir), evaluate its checkpoints, or classify --images with the best one.",
)
flags.adopt_module_key_flags(predict)
flags.adopt_module_key_flags(processes)


def _main(arguments: list[str]) -> None:
    if arguments and _MODE.value != "predict":
        raise UserError(f"unexpected argument {arguments[0]!r}; every option is a --flag")
    if _MODE.value == "train" and not cli.CONFIG.present:
        raise UserError(f"--config is missing; usage: {_USAGE}")
    of_predict = (predict.IMAGES, predict.JSON, predict.ROLLOUT)
    of_others = (processes.COORDINATOR_ADDRESS, processes.NUM_PROCESSES, processes.PROCESS_ID)
    for flag in of_others if _MODE.value == "predict" else of_predict:
        if flag.present:
            raise UserError(f"--{flag.name} is not for --mode={_MODE.value}; leave it out")
    MODES[_MODE.value](arguments)


if __name__ == "__main__":
    cli.run(_main, _USAGE, required=("workdir",), optional=("config",), positional=True)
