"""From the words of a command line to arguments of Python functions.

`groups` has the options that several commands share, `values` reads the text of one option, `arguments` checks options
and turns them into settings and a loaded model, and `tasks` finds out which tasks the words can name.
"""
