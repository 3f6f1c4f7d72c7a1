"""The command line: `florence2 VERB TASK... IMAGE... --flags`. Begin with `main`."""
