-- Users whom an auth service keeps, as on Supabase: their tokens name them, and its table says when they are gone.

-- When a user was last erased: asked when a token comes of somebody without a profile.
CREATE INDEX user_activity_log_erased ON user_activity_log (resource_id, created_at) WHERE action = 'user.erased';

-- No foreign key to auth.users: there are users of ours whom no auth service knows, such as holders of API keys, and a
-- cascade would leave the files. So the end of a user there is the request for the user's erasure here: the access ends
-- in the same transaction, and upkeep deletes rows and files.
CREATE FUNCTION ourvidz.gone_user() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM profiles WHERE id = OLD.id) THEN
    DELETE FROM api_keys WHERE user_id = OLD.id;
    DELETE FROM user_roles WHERE user_id = OLD.id;
    INSERT INTO erasures (user_id) VALUES (OLD.id) ON CONFLICT DO NOTHING;
    IF FOUND THEN
      INSERT INTO user_activity_log (action, resource_type, resource_id, metadata)
      VALUES ('user.erased', 'user', OLD.id::text, '{"asked_by": "auth"}');
    END IF;
  END IF;
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.gone_user() FROM PUBLIC;

DO $$
BEGIN
  IF to_regclass('auth.users') IS NOT NULL THEN
    CREATE TRIGGER ourvidz_gone_user AFTER DELETE ON auth.users FOR EACH ROW EXECUTE FUNCTION ourvidz.gone_user();
    -- whoever signed up before this database was ours
    IF has_table_privilege('auth.users', 'SELECT') THEN
      INSERT INTO profiles (id) SELECT id FROM auth.users ON CONFLICT (id) DO NOTHING;
      INSERT INTO user_roles (user_id, role)
      SELECT id, 'basic_user' FROM auth.users u WHERE NOT EXISTS (SELECT FROM user_roles r WHERE r.user_id = u.id);
    END IF;
  END IF;
END $$;

-- Made before the first migration, and so with whatever rights a database grants by default.
REVOKE ALL ON schema_migrations FROM anon, authenticated;
