"""`python -m sdlite.cli` is the command `sdlite`: what `accelerate launch -m` takes."""

from sdlite.cli import main

raise SystemExit(main())
