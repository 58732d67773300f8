"""The SQL console: what was asked is kept in the browser, has a link, and times are the reader's."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from support.browser import DashboardProcess, open_tab

pytestmark = pytest.mark.long
NOON = "SELECT TIMESTAMPTZ '2026-01-01 12:00:00+00' AS at, 'café & tea' AS what"


def test_questions_are_kept_in_the_browser_and_shared_as_links(dashboard: DashboardProcess, browser: Any) -> None:
    with dashboard.logged_in("vera") as session, dashboard.logged_in("rita") as other:
        tab = open_tab(browser, dashboard, session, timezone_id="Asia/Kolkata", permissions=["clipboard-read"])
        page = tab.go(f"/analytics?sql={quote(NOON)}")
        page.wait_for_selector("td:has-text('2026-01-01 17:30:00')")
        page.wait_for_selector("text=1 row, times in IST")
        page.fill("[aria-label='Name of the saved question']", "tea <time>")
        page.click("button:text-is('Save')")
        page.wait_for_selector("a:text-is('tea <time>')")
        page.click("button:text-is('Copy SQL')")
        page.wait_for_selector("button:text-is('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == NOON

        page.click(".cm-content")
        page.keyboard.press("Control+A")
        page.keyboard.type("SELECT 42 AS answer")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("th:has-text('answer')")
        page.click("summary:has-text('Recent statements, 2')")
        page.click(".sql-line:has-text('SELECT TIMESTAMPTZ') a")
        page.wait_for_selector("td:has-text('2026-01-01 17:30:00')")
        # A link works for somebody else, who sees nothing of what was asked here.
        link = page.get_attribute("a:text-is('tea <time>')", "href")
        cookie = {"name": "corral_session", "value": other.cookies["corral_session"], "url": dashboard.url}
        page.context.add_cookies([cookie])
        page.goto(link)
        page.wait_for_selector("td:has-text('2026-01-01 17:30:00')")
        assert page.locator("text=Saved questions").count() == 0
        page.wait_for_selector("summary:has-text('Recent statements, 1')")
        assert tab.complaints == []
        page.context.close()
