"""How the distribution `florence2-lite` is made: `python -m recipes.lite FOLDER` writes its wheel.

Two distributions must not write into one package, so the wheel's package is `florence2_lite`: the files of
`florence2/lite` at its top, and below it those that they import, with these imports renamed. `modules` reads which from
the import statements, `wheel` copies and builds.
"""
