"""Mutation testing: change the package in one place, and see whether the tests notice. `python -m tests.mutate --help`.

`mutants` makes the changes, `selection` finds the tests of a module, `running` runs them in a copy of the checkout, and
`equivalent` lists the changes that no test can see, each with its reason.
"""
