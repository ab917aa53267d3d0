-- name: default_grants()
-- What this role grants by default to users' roles on whatever it makes in the schema public, as Supabase sets it up: a
-- pair of statements for each right, which take it from what is made next and give it back.
SELECT format('ALTER DEFAULT PRIVILEGES %s REVOKE %s ON %s FROM %I', place, privilege, kind, grantee) AS withhold,
       format('ALTER DEFAULT PRIVILEGES %s GRANT %s ON %s TO %I%s', place, privilege, kind, grantee,
              CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END) AS restore
FROM (
  SELECT CASE WHEN d.defaclnamespace = 0 THEN '' ELSE format('IN SCHEMA %s', d.defaclnamespace::regnamespace) END AS place,
         CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS'
                              WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' END AS kind,
         a.privilege_type AS privilege, r.rolname AS grantee, a.is_grantable
  FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) a JOIN pg_roles r ON r.oid = a.grantee
  WHERE d.defaclrole = current_user::regrole AND d.defaclnamespace IN (0, 'public'::regnamespace)
    AND r.rolname IN ('anon', 'authenticated')
) granted
WHERE kind IS NOT NULL;
