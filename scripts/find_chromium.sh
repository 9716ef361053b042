#!/bin/bash
# Print the path of a Chromium; install Debian's, or Playwright's own, where there is none.
set -u

found() {
	command -v chromium || command -v chromium-browser || command -v google-chrome ||
		.venv/bin/python -c "$PLAYWRIGHTS" 2>/dev/null
}
PLAYWRIGHTS='
import os
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    path = playwright.chromium.executable_path
assert os.path.exists(path)
print(path)
'

found && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "Installing Debian's chromium …" >&2
	{ apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >&2
else
	echo "Fetching Playwright's Chromium …" >&2
	.venv/bin/python -m playwright install chromium >&2
fi
found || {
	echo "make test-browser needs Chromium, and none was found or could be installed. Install one" \
		"(apt-get install chromium), or name it: make test-browser CHROMIUM=/path/to/chrome" >&2
	exit 1
}
