"""Define the entry point of the command line: the table of commands, and the handling of errors."""

import io
import os
import re
import sys
from typing import Annotated, Any

import typer

from llmkit import __version__
from llmkit.commands import convert, evaluate, label, look, rate, score, train, write
from llmkit.commands.data import data_app, tokenizer_app
from llmkit.commands.show import Command

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmkit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """From raw text to a trained, fine-tuned, evaluated and exported language model."""


for name, command in {
    "pretrain": train.pretrain,
    "finetune": train.finetune,
    "eval": evaluate.evaluate,
    "score": score.score,
    "rate": rate.rate,
    "classify": label.classify,
    "embed": label.embed,
    "generate": write.generate,
    "chat": write.chat,
    "serve": write.serve,
    "export": convert.export,
    "merge": convert.merge,
    "average": convert.average,
    "import": convert.import_,
    "plan": train.plan,
    "runs": look.runs,
    "init": look.init,
    "keys": look.keys,
    "schema": look.schema,
    "doctor": look.doctor,
}.items():
    app.command(name, cls=Command)(command)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Print a user's mistake as one block with an exit code, never as a traceback."""
    from llmkit.errors import BUG, INTERRUPTED, UserError, explain_machine

    # Threads that wait for each other sleep soon (in libgomp's unit, of which its default is 300,000). Alone this costs
    # nothing, and beside other work steps are 2.5 times as fast: measured with two runs on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # no byte that is read and no character that is printed ends a command
            stream.reconfigure(errors=errors)
    try:
        check_encoding(arguments)
        code = app(arguments, prog_name="llmkit", standalone_mode=False)
        if code == INTERRUPTED[2]:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except UserError as error:
        code = print_error(error)
    except KeyboardInterrupt:
        resumes = arguments[:1] in (["pretrain"], ["finetune"]) or arguments[:2] == ["data", "build"]
        print("interrupted" + ("; the same command resumes" if resumes else ""), file=sys.stderr)
        code = INTERRUPTED[2]
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        if known := explain_machine(error):
            code = print_error(known)
        elif "KeyboardInterrupt" in f"{type(error.__cause__)} {type(error.__context__)} {error}":
            code = INTERRUPTED[2]  # a library was interrupted, and raised an error of its own
        elif type(error).__name__ == "NoArgsIsHelpError":
            print(error.ctx.get_help(), file=sys.stderr)
            code = error.exit_code
        elif hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's own, as a missing argument
            code = print_error(explain_usage(error))
        elif debug:
            raise
        else:
            fix = "this is a bug in llmkit; --debug shows the traceback"
            code = print_error(UserError(f"{type(error).__name__}: {error}", fix=fix, code=BUG))
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a rank that torchrun or a cluster's launcher started
        from llmkit.parallel.rank import end_process

        end_process(code or 0)
    sys.exit(code or 0)


def print_error(error: Any) -> int:
    """Print a UserError, safe for a terminal and without secrets, and return its exit code."""
    from llmkit.screen import hide_secrets, printable

    print(printable(hide_secrets(str(error))), file=sys.stderr)
    return error.code


def check_encoding(arguments: list[str]) -> None:
    """Raise UserError if an argument has bytes that are not UTF-8. Python keeps them as lone surrogates."""
    from llmkit.errors import UserError

    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            fix = "type it in UTF-8; if it is the name of a file, rename the file"
            raise UserError("an argument is not UTF-8 text", got=ascii(argument), fix=fix) from None


def explain_usage(error: Any) -> Any:
    """Convert an error of typer about the arguments to a UserError.

    error  has a message such as "No such command 'pretrian'. Did you mean 'pretrain'?"
    """
    from llmkit.errors import UserError

    pattern = r"(.+?)\.?(?: (?:Did you mean|\(Possible options:) (.+)[?)])?"
    what, similar = re.fullmatch(pattern, error.format_message(), re.DOTALL).groups()
    command = error.ctx.command_path if error.ctx else "llmkit"
    fix = f"did you mean {similar}?".replace("'", "") if similar else f"{command} --help lists what there is"
    return UserError(what, at=error.ctx and command, fix=fix)
