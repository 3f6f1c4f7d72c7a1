"""`Progress` under its former name, until `florence2.inspect` takes a `progress` callback."""

from florence2.cli.progress import Progress as Progress
