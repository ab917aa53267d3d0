-- Who may do what: roles of the database, users, their application roles and API keys.

CREATE SCHEMA ourvidz;

-- The first three are the roles that Supabase has already; the fourth is ours, for replicas. A role belongs to the
-- whole server, so another database's migration may be creating it at this very moment.
DO $$
DECLARE wanted text;
BEGIN
  FOREACH wanted IN ARRAY ARRAY['anon', 'authenticated', 'service_role', 'ourvidz_worker'] LOOP
    BEGIN
      IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
        EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', wanted);
      END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
      NULL;  -- the other migration won the race; the role is there, which is all that is wanted
    END;
  END LOOP;
END $$;
-- the user that migrates is the one that serves; it takes these roles on for a transaction (SET LOCAL ROLE)
DO $$
BEGIN
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    EXECUTE format('GRANT anon, authenticated, service_role, ourvidz_worker TO %I', current_user);
  END IF;
END $$;

GRANT USAGE ON SCHEMA public, ourvidz TO anon, authenticated, service_role, ourvidz_worker;

-- The caller of this transaction, from the claims that the API sets (the same setting that PostgREST uses).
CREATE FUNCTION ourvidz.uid() RETURNS uuid
LANGUAGE sql STABLE AS $$
  SELECT nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')::uuid
$$;

CREATE FUNCTION ourvidz.touch() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_at := now();
  RETURN NEW;
END $$;

CREATE TABLE profiles (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  username text UNIQUE CHECK (username <> ''),
  subscription_status text NOT NULL DEFAULT 'inactive'
    CHECK (subscription_status IN ('inactive', 'starter', 'pro', 'creator')),
  token_balance int NOT NULL DEFAULT 100,
  age_verified boolean NOT NULL DEFAULT false,
  birth_date date,
  age_verification_date timestamptz,
  callback_secret_version int NOT NULL DEFAULT 1 CHECK (callback_secret_version > 0),
  callback_secret_rotated_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TRIGGER profiles_touch BEFORE UPDATE ON profiles FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();

CREATE TYPE app_role AS ENUM ('admin', 'moderator', 'premium_user', 'basic_user', 'guest');

CREATE TABLE user_roles (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  role app_role NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (user_id, role)
);

-- SECURITY DEFINER, because policies on user_roles itself ask it.
CREATE FUNCTION has_role(_user_id uuid, _role app_role) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public AS $$
  SELECT EXISTS (SELECT FROM user_roles WHERE user_id = _user_id AND role = _role)
$$;

CREATE TABLE api_keys (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  name text NOT NULL CHECK (name <> ''),
  prefix text NOT NULL,                       -- the first characters, shown so that a person can tell keys apart
  key_hash bytea NOT NULL UNIQUE CHECK (length(key_hash) = 32),  -- SHA-256 of the whole key
  created_at timestamptz NOT NULL DEFAULT now(),
  last_used_at timestamptz,
  expires_at timestamptz,
  revoked_at timestamptz
);
CREATE INDEX api_keys_user ON api_keys (user_id);

-- Who did what that others must be able to look up later. Never a prompt, a key or a URL.
CREATE TABLE user_activity_log (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid REFERENCES profiles ON DELETE SET NULL,
  action text NOT NULL CHECK (action <> ''),
  resource_type text,
  resource_id text,
  metadata jsonb NOT NULL DEFAULT '{}',
  ip_address inet,
  user_agent text,
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX user_activity_log_at ON user_activity_log (created_at);
