"""Train, evaluate or predict: python main.py --config configs/digits.py --workdir runs/digits [--mode MODE]."""

import json

from absl import flags

from simplest_vit import cli
from simplest_vit.errors import UserError

_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "predict"],
    "Train (or go on with the run in workdir), evaluate its checkpoints, or classify --images with the best one.",
)
_IMAGES = flags.DEFINE_multi_string("images", [], "For predict: image files and folders; more may follow the first.")
_JSON = flags.DEFINE_bool("json", False, "For predict: print JSON lines instead of a table.")
_ROLLOUT = flags.DEFINE_string("attention_rollout", None, "For predict: folder for a picture of attention an image.")

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "For several processes: HOST:PORT of process 0; or --config.distributed=auto."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "For several processes: how many.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "For several processes: which one this is.", lower_bound=0)


def _main(arguments: list[str]) -> None:
    if arguments and _MODE.value != "predict":
        raise UserError(f"unexpected argument {arguments[0]!r}; every option is a --flag")
    config, workdir = cli.CONFIG.value, cli.WORKDIR.value
    # Imported here, so that a mistyped flag is answered at once.
    if _MODE.value == "predict":
        for flag in (_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID):
            if flag.present:
                raise UserError(f"--{flag.name} is not for --mode=predict, which is one process; leave it out")
        from simplest_vit import predict

        predictions = predict.predict(config, workdir, [*_IMAGES.value, *arguments], _ROLLOUT.value)
        print(predict.as_json_lines(predictions) if _JSON.value else predict.as_table(predictions))
        return
    import jax

    from simplest_vit.config import check_config
    from simplest_vit.training import distributed, loop

    check_config(config)  # before the others are waited for
    if _MODE.value == "evaluate":  # JAX takes SIGTERM to have all stop behind the same step: here there is none
        jax.config.update("jax_enable_preemption_service", False)
    distributed.initialize(
        config.get("distributed") == "auto", _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    with distributed.stop_with_the_others():
        if _MODE.value == "train":
            outcome = loop.train_and_evaluate(config, workdir)
            outcome = {name: value for name, value in outcome.items() if not isinstance(value, dict)}
        else:
            outcome = loop.evaluate(config, workdir)
    if distributed.is_primary():
        print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    cli.run(_main, usage=__doc__.split(": ", 1)[1], positional=True)
