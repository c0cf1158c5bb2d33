"""A world that died and was given a second start is no secret: its test passes, and the report names it."""

from collections.abc import Iterator

import pytest
import worlds

AGAIN = "a world was started again"


@pytest.fixture(autouse=True)
def what_was_started_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Goes with the test's report, from a worker of xdist too, and into a junit file."""
    yield
    request.node.user_properties += [(AGAIN, what) for what in worlds.started_again]
    worlds.started_again.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = {
        (report.nodeid, what)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
        for name, what in report.user_properties
        if name == AGAIN
    }
    for test, what in sorted(found):
        terminalreporter.section(f"{AGAIN}: {test}", yellow=True)
        terminalreporter.line(what)
