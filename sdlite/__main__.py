"""`python -m sdlite` is the command `sdlite`."""

from sdlite.cli import main

raise SystemExit(main())
