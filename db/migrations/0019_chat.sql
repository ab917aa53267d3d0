-- Conversations with the language model and their messages. Both messages of an exchange come in one transaction, after
-- the answer is complete, so a question without an answer is never there.

CREATE TABLE conversations (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  project_id uuid REFERENCES projects ON DELETE SET NULL,
  title text NOT NULL DEFAULT 'New Conversation' CHECK (length(title) BETWEEN 1 AND 200),
  conversation_type text NOT NULL DEFAULT 'general' CHECK (conversation_type <> ''),
  status text NOT NULL DEFAULT 'active' CHECK (status <> ''),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),  -- also of the last message
  character_id uuid REFERENCES characters ON DELETE SET NULL,       -- who answers
  user_character_id uuid REFERENCES characters ON DELETE SET NULL,  -- who asks
  memory_tier text DEFAULT 'conversation',
  memory_data jsonb DEFAULT '{}',
  current_location text,
  last_scene_image text
);
CREATE INDEX conversations_user ON conversations (user_id, updated_at DESC, id DESC);
-- a deleted character looks its conversations up
CREATE INDEX conversations_character ON conversations (character_id) WHERE character_id IS NOT NULL;
CREATE INDEX conversations_user_character ON conversations (user_character_id) WHERE user_character_id IS NOT NULL;
CREATE INDEX conversations_project ON conversations (project_id) WHERE project_id IS NOT NULL;
CREATE TRIGGER conversations_touch BEFORE UPDATE ON conversations FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();

UPDATE character_scenes SET conversation_id = NULL WHERE conversation_id IS NOT NULL;  -- there was nothing to name
ALTER TABLE character_scenes ADD FOREIGN KEY (conversation_id) REFERENCES conversations ON DELETE SET NULL;

CREATE TABLE messages (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  conversation_id uuid NOT NULL REFERENCES conversations ON DELETE CASCADE,
  sender text NOT NULL CHECK (sender IN ('user', 'assistant')),
  content text NOT NULL CHECK (content <> ''),
  message_type text NOT NULL DEFAULT 'text' CHECK (message_type <> ''),
  created_at timestamptz NOT NULL DEFAULT now(),
  seq bigint GENERATED ALWAYS AS IDENTITY     -- the order within a conversation; both of an exchange have one time
);
CREATE INDEX messages_conversation ON messages (conversation_id, seq);

-- For messages that come in otherwise than by our statement, which has touched the conversation already.
CREATE FUNCTION ourvidz.touch_conversation() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE conversations c SET updated_at = now()
  WHERE c.id IN (SELECT conversation_id FROM added) AND c.updated_at < now();
  RETURN NULL;
END $$;
CREATE TRIGGER messages_touch_conversation AFTER INSERT ON messages REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.touch_conversation();

-- What a request with an Idempotency-Key stored. The answer itself is in the messages.
CREATE TABLE message_keys (
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  key text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
  body_hash bytea NOT NULL,
  conversation_id uuid NOT NULL REFERENCES conversations ON DELETE CASCADE,
  question_id uuid NOT NULL,
  answer_id uuid NOT NULL,
  account jsonb NOT NULL,                     -- how the answer was made: lengths, names and times, no text
  expires_at timestamptz NOT NULL,
  PRIMARY KEY (user_id, key)
);
CREATE INDEX message_keys_conversation ON message_keys (conversation_id);

ALTER TABLE conversations ENABLE ROW LEVEL SECURITY;
ALTER TABLE messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_keys ENABLE ROW LEVEL SECURITY;

-- A conversation is its user's, not the staff's. Clients of PostgREST write them directly; the identity, and with it the
-- owner, stays. Whoever speaks there speaks as the user: the assistant's words come from the model only.
GRANT SELECT, DELETE ON conversations TO authenticated;
GRANT INSERT (id, user_id, project_id, title, conversation_type, status, character_id, user_character_id, memory_tier,
              memory_data, current_location),
      UPDATE (updated_at, project_id, title, conversation_type, status, character_id, user_character_id, memory_tier,
              memory_data, current_location)
  ON conversations TO authenticated;
CREATE POLICY own ON conversations TO authenticated
  USING (user_id = (SELECT ourvidz.uid())) WITH CHECK (user_id = (SELECT ourvidz.uid()));
GRANT SELECT ON messages TO authenticated;
GRANT INSERT (id, conversation_id, sender, content, message_type) ON messages TO authenticated;
CREATE POLICY own_read ON messages FOR SELECT TO authenticated
  USING (EXISTS (SELECT FROM conversations c WHERE c.id = conversation_id AND c.user_id = (SELECT ourvidz.uid())));
CREATE POLICY own_add ON messages FOR INSERT TO authenticated
  WITH CHECK (sender = 'user'
              AND EXISTS (SELECT FROM conversations c WHERE c.id = conversation_id AND c.user_id = (SELECT ourvidz.uid())));
