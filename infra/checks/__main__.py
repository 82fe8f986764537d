"""`python -m infra.checks aws`."""

import sys

from infra.checks import check

sys.exit(check.main())
