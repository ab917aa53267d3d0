"""Maintenance mode, for work that is no job. Jobs are refused by the statement that would accept them."""

from db.access import Principal
from db.limits import MAINTENANCE_RETRY_SECONDS, LimitReached, SystemConfig
from serve_app.edge import Edge


async def refuse_in_maintenance(edge: Edge, user: Principal) -> None:
    """Raise `LimitReached` while the installation is maintained and takes no new work of this user."""
    if not user.is_admin() and await SystemConfig(edge.pool).maintenance():
        raise LimitReached("maintenance", "maintenanceMode", retry_after=MAINTENANCE_RETRY_SECONDS)
