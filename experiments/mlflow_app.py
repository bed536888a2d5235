"""MLflow's server with one page more, where ``dtr-lab ui`` lets a browser in.

MLflow 3.17 greets a new browser in a mode for language models, in which training runs are filed under "Evaluations",
and with an assistant over a quarter of the window. What it remembers of a user's choice lies in the browser, where a
link cannot reach it; this page, of the same origin, sets it, unless the user has chosen already, and goes on to the
page asked for. It is run by MLflow's plugin for apps, ``mlflow server --app-name dtr-lab``, which finds this module by
the entry point in ``pyproject.toml``.
"""

from __future__ import annotations

from mlflow.server.fastapi_app import app
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

START = "/start"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MLflow</title></head><body><script>
const first = (key, value) => { if (localStorage.getItem(key) === null) localStorage.setItem(key, value); };
first("mlflow.workflowType_v1", '"machine_learning"');
first("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
location.replace("/" + location.hash);
</script></body></html>
"""


async def start(request: Request) -> HTMLResponse:  # noqa: ARG001
    """The page: it goes on to the part of its own address behind the ``#``, so it leads nowhere but into MLflow."""
    return HTMLResponse(_PAGE, headers={"Cache-Control": "no-store"})


# Before MLflow's routes, the last of which takes everything.
app.router.routes.insert(0, Route(START, start))
