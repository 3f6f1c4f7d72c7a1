"""The command line: `florence2 COMMAND TASK... IMAGE... --flags`.

`main` looks a command up and turns errors into sentences; each command has a file of its own; `options` holds what
commands share, and `progress` the only progress bar. Nothing here imports torch before the arguments are checked.
"""
