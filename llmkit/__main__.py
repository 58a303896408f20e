"""Run the command line: python -m llmkit."""

from llmkit.commands.app import main

if __name__ == "__main__":
    main()
