# The project's commands; CONTRIBUTING.md says when to use which.
.PHONY: check slow browser docs lowest

# What has to pass before a change goes in: the default run of the tests, and ruff.
check:
	pytest -n 2 --dist loadfile
	ruff check .
	ruff format --check .

# The longer tests, those of long pages and of the site among them.
slow:
	pytest -n 2 --dist loadfile -m slow

# Those that need a headless Chromium.
browser:
	pytest -m browser

# The site, in outputs/site: open index.html, no server is needed. A warning is an error.
docs:
	python -m sphinx -W --keep-going -q -b html docs outputs/site

# The lowest stated versions, in an environment of their own.
lowest:
	python tests/lower_bounds.py outputs/lowest
