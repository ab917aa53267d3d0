-- Functions that run with their owner's rights find our tables and nobody's temporary ones: unless it is named last,
-- a session's own schema of temporary tables is searched first.

ALTER FUNCTION has_role(uuid, app_role) SET search_path = public, pg_temp;
ALTER FUNCTION ourvidz.standing(uuid) SET search_path = public, pg_temp;
ALTER FUNCTION ourvidz.erase_some(uuid, int) SET search_path = public, pg_temp;
