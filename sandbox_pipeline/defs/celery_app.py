"""For workers: `celery -A sandbox_pipeline.defs.celery_app worker`."""

import os

from sandbox_pipeline.defs.celery_steps import celery_app

# Celery wants an object at import; nothing else imports this module.
app = celery_app(dict(os.environ))
