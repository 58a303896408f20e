"""Define the entry point of the command line: the table of commands, and the handling of errors."""

import sys
from typing import Annotated

import typer

from llmkit.commands import convert, evaluate, look, train, write
from llmkit.commands.data import data_app, tokenizer_app

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def common(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """From raw text to a trained, fine-tuned, evaluated and exported language model."""


for name, command in {
    "pretrain": train.pretrain,
    "finetune": train.finetune,
    "eval": evaluate.evaluate,
    "generate": write.generate,
    "chat": write.chat,
    "serve": write.serve,
    "export": convert.export,
    "import": convert.import_,
    "plan": train.plan,
    "runs": look.runs,
    "init": look.init,
    "doctor": look.doctor,
}.items():
    app.command(name)(command)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Print a user's mistake as one block with an exit code, never as a traceback."""
    from llmkit.errors import BUG, ENVIRONMENT, INTERRUPTED, UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume a training run or a data build", file=sys.stderr)
        code = INTERRUPTED[2]
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        print(UserError(error.strerror or str(error), at=error.filename), file=sys.stderr)
        code = ENVIRONMENT
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            fix = "lower train.micro_batch_size, or set train.gradient_checkpointing: full"
            print(UserError("the device is out of memory", fix=fix), file=sys.stderr)
            code = ENVIRONMENT
        elif hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own errors, such as a missing argument
            error.show()
            code = error.exit_code
        elif debug:
            raise
        else:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
            print("  this is a bug in llmkit; --debug shows the traceback", file=sys.stderr)
            code = BUG
    sys.exit(code or 0)
