-- name: list_page(user_id, status, before, page_size)
-- A user's conversations, the one that was spoken in last first, as far as row-level security lets the caller see.
SELECT c.*, (SELECT count(*) FROM messages m WHERE m.conversation_id = c.id) AS messages
FROM conversations c
WHERE c.user_id = :user_id AND (:status::text IS NULL OR c.status = :status)
  AND (:before::uuid IS NULL
       OR (c.updated_at, c.id) < (SELECT b.updated_at, b.id FROM conversations b WHERE b.id = :before))
ORDER BY c.updated_at DESC, c.id DESC LIMIT :page_size;

-- name: read(user_id, conversation_id)^
-- One conversation of a user, as far as row-level security lets the caller see.
SELECT c.*, (SELECT count(*) FROM messages m WHERE m.conversation_id = c.id) AS messages
FROM conversations c WHERE c.id = :conversation_id AND c.user_id = :user_id;

-- name: list_messages(conversation_id, before, after, page_size)
-- A page of messages in their order: the latest, those before one, or those after one.
SELECT * FROM (
  SELECT id, conversation_id, sender, content, message_type, created_at, seq FROM messages
  WHERE conversation_id = :conversation_id
    AND (:before::uuid IS NULL
         OR seq < (SELECT b.seq FROM messages b WHERE b.id = :before AND b.conversation_id = :conversation_id))
    AND (:after::uuid IS NULL
         OR seq > (SELECT a.seq FROM messages a WHERE a.id = :after AND a.conversation_id = :conversation_id))
  ORDER BY CASE WHEN :after IS NULL THEN -seq ELSE seq END LIMIT :page_size
) page ORDER BY seq;

-- name: create(id, user_id, title, conversation_type, project_id, character_id, user_character_id)!
INSERT INTO conversations (id, user_id, title, conversation_type, project_id, character_id, user_character_id)
VALUES (:id, :user_id, :title, :conversation_type, :project_id, :character_id, :user_character_id);

-- name: change(user_id, conversation_id, title, status)$
-- Change what is not null.
UPDATE conversations SET title = coalesce(:title::text, title), status = coalesce(:status::text, status)
WHERE id = :conversation_id AND user_id = :user_id RETURNING id;

-- name: remove(user_id, conversation_id)$
-- Delete a conversation with its messages.
DELETE FROM conversations WHERE id = :conversation_id AND user_id = :user_id RETURNING id;

-- name: hold(user_id, conversation_id)$
-- Make the others who add to this conversation wait for the end of this transaction.
UPDATE conversations SET updated_at = now() WHERE id = :conversation_id AND user_id = :user_id RETURNING id;

-- name: add(conversation_id, question_id, question, answer_id, answer)
-- Both messages of an exchange, the question first.
INSERT INTO messages (id, conversation_id, sender, content)
SELECT said.id, :conversation_id, said.sender, said.content
FROM (VALUES (:question_id::uuid, 'user', :question::text), (:answer_id, 'assistant', :answer)) said (id, sender, content)
ORDER BY said.sender DESC
RETURNING id, conversation_id, sender, content, message_type, created_at, seq;

-- name: find_key(user_id, key)^
-- What an earlier request with this key stored.
SELECT body_hash, conversation_id, question_id, answer_id, account FROM message_keys
WHERE user_id = :user_id AND key = :key AND expires_at > now();

-- name: store_key(user_id, key, body_hash, conversation_id, question_id, answer_id, account, hours)$
-- Remember a key, and forget this user's expired ones. Nothing comes back where the key stands for something already.
WITH expired AS (
  DELETE FROM message_keys WHERE user_id = :user_id AND expires_at <= now() AND key <> :key
)
INSERT INTO message_keys AS k (user_id, key, body_hash, conversation_id, question_id, answer_id, account, expires_at)
VALUES (:user_id, :key, :body_hash, :conversation_id, :question_id, :answer_id, :account,
        now() + make_interval(hours => :hours::int))
ON CONFLICT (user_id, key) DO UPDATE
  SET body_hash = excluded.body_hash, conversation_id = excluded.conversation_id, question_id = excluded.question_id,
      answer_id = excluded.answer_id, account = excluded.account, expires_at = excluded.expires_at
  WHERE k.expires_at <= now()
RETURNING key;

-- name: find_messages(user_id, ids)
-- Messages by their ids, in their order, of a user's own conversations.
SELECT m.id, m.conversation_id, m.sender, m.content, m.message_type, m.created_at, m.seq
FROM messages m JOIN conversations c ON c.id = m.conversation_id
WHERE m.id = ANY (:ids::uuid[]) AND c.user_id = :user_id ORDER BY m.seq;

-- name: read_character(character_id)^
-- What a character is to the language model, as far as row-level security lets the caller see.
SELECT id, name, description, traits, persona, system_prompt, voice_tone, mood, gender, content_rating, voice_examples,
       forbidden_phrases
FROM characters WHERE id = :character_id;

-- name: has_project(user_id, project_id)$
-- Whether a project is a user's own.
SELECT EXISTS (SELECT FROM projects WHERE id = :project_id AND user_id = :user_id);

-- name: list_chat_templates(use_cases)
-- The active templates of chat for these use cases.
SELECT id, template_name, use_case, content_mode, system_prompt, token_limit FROM prompt_templates
WHERE is_active AND use_case = ANY (:use_cases::text[]) ORDER BY template_name, content_mode;

-- name: read_chat_template(template_id)^
-- One active template of chat.
SELECT id, template_name, use_case, content_mode, system_prompt, token_limit FROM prompt_templates
WHERE id = :template_id AND is_active AND job_type = 'chat';
