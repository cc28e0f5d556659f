"""JUnit XML of checks and of changes, as pipelines read it."""

import io
from collections.abc import Iterable

from junitparser import JUnitXml, TestCase, TestSuite


def junit_xml(name: str, suites: Iterable[tuple[str, Iterable[TestCase]]]) -> bytes:
    """One file of named suites, with their counts."""
    xml = JUnitXml(name)
    for title, cases in suites:
        suite = TestSuite(title)
        suite.add_testcases(list(cases))
        xml.add_testsuite(suite)
    xml.update_statistics()  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    xml.write(buffer, pretty=True)
    return buffer.getvalue()
