-- name: list_results(status, after_at, after_id, page_size)
-- A page of results, the oldest first; each once, as the item that it is kept as, or else as the asset of the workspace.
-- Without a status those that wait for a review: what is flagged, and of what is pending that which somebody wants to
-- publish, which a classifier could not judge, or, where the installation reviews all, everything.
SELECT r.* FROM (
  (SELECT 'library' AS kind, l.id, l.user_id, l.source_job_id AS job_id, l.asset_type, l.storage_path, l.thumbnail_path,
          l.mime_type, l.width, l.height, l.duration_seconds, l.original_prompt, l.model_used, l.visibility,
          l.moderation_status, l.moderation_reason, l.created_at
   FROM user_library l
   WHERE l.moderation_status = ANY (CASE WHEN :status::text IS NULL THEN ARRAY['pending', 'flagged'] ELSE ARRAY[:status] END)
     AND (:status::text IS NOT NULL OR l.moderation_status = 'flagged' OR l.visibility <> 'private'
          OR l.moderation_reason IS NOT NULL OR (SELECT ourvidz.moderation_mode()) = 'all')
     AND (:after_at::timestamptz IS NULL OR (l.created_at, l.id) > (:after_at, :after_id::uuid))
   ORDER BY l.created_at, l.id LIMIT :page_size::int)
  UNION ALL
  (SELECT 'workspace', a.id, a.user_id, a.job_id, a.asset_type, a.temp_storage_path, a.thumbnail_path,
          a.mime_type, a.width, a.height, a.duration_seconds, a.original_prompt, a.model_used, 'private',
          a.moderation_status, a.moderation_reason, a.created_at
   FROM workspace_assets a
   WHERE a.moderation_status = ANY (CASE WHEN :status::text IS NULL THEN ARRAY['pending', 'flagged'] ELSE ARRAY[:status] END)
     AND (:status::text IS NOT NULL OR a.moderation_status = 'flagged' OR a.moderation_reason IS NOT NULL
          OR (SELECT ourvidz.moderation_mode()) = 'all')
     AND a.expires_at > now() AND a.source_library_id IS NULL
     AND NOT EXISTS (SELECT FROM user_library l WHERE l.source_asset_id = a.id)
     AND (:after_at::timestamptz IS NULL OR (a.created_at, a.id) > (:after_at, :after_id::uuid))
   ORDER BY a.created_at, a.id LIMIT :page_size::int)
) r ORDER BY r.created_at, r.id LIMIT :page_size::int;

-- name: result(asset_id)^
SELECT 'library' AS kind, l.id, l.user_id, l.source_job_id AS job_id, l.asset_type, l.storage_path, l.thumbnail_path,
       l.mime_type, l.width, l.height, l.duration_seconds, l.original_prompt, l.model_used, l.visibility,
       l.moderation_status, l.moderation_reason, l.created_at
FROM user_library l WHERE l.id = :asset_id
UNION ALL
SELECT 'workspace', a.id, a.user_id, a.job_id, a.asset_type, a.temp_storage_path, a.thumbnail_path,
       a.mime_type, a.width, a.height, a.duration_seconds, a.original_prompt, a.model_used, 'private',
       a.moderation_status, a.moderation_reason, a.created_at
FROM workspace_assets a WHERE a.id = :asset_id;

-- name: reviews_of(asset_id)
-- What was decided about a result, the latest first.
SELECT r.reviewer, r.was, r.status, r.reason, r.notes, r.created_at
FROM moderation_reviews r WHERE r.asset_id = :asset_id OR r.asset_id = (SELECT source_asset_id FROM user_library WHERE id = :asset_id)
ORDER BY r.created_at DESC, r.id LIMIT 100;

-- name: moderate(asset_id, status, reason, notes, reviewer, expected)^
SELECT was, done FROM ourvidz.moderate(:asset_id, :status, :reason, :notes, :reviewer, :expected);

-- name: list_published(before_at, before_id, page_size)
-- A page of what is public, newest first, as far as the caller may see it.
SELECT p.* FROM published_items p
WHERE :before_at::timestamptz IS NULL OR (p.created_at, p.id) < (:before_at, :before_id::uuid)
ORDER BY p.created_at DESC, p.id DESC LIMIT :page_size::int;

-- name: published(item_id)^
SELECT * FROM ourvidz.published_item(:item_id);
