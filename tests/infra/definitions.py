"""What objects of operators are held to: our own schemas, and the operators' where they lie at hand."""

import pytest

from infra.checks import schemas

CRDS = schemas.crds_folder()
DEFINITIONS = [pytest.param(None, id="own"), pytest.param(CRDS, id="crds")] if CRDS else [pytest.param(None, id="own")]
