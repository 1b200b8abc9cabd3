-- Appends messages to a stream unless it has seen their event ids, and rings the bell: 'TOPIC ID'.
-- KEYS: stream, seen
-- ARGV: bell, topic, length to trim to (0: none), event ids to remember,
--       ids of the sender's oldest and newest entries that must still be there (or ''),
--       then event id and message in turns
-- Returns the id of an entry at or behind each message; nil if an entry is gone that should not be.
local stream, seen = KEYS[1], KEYS[2]

for i = 5, 6 do
  if ARGV[i] ~= '' and #redis.call('XRANGE', stream, ARGV[i], ARGV[i]) == 0 then
    return false
  end
end

local function last_id()
  return redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1][1]
end

local function append(event_id, message)
  local id
  if ARGV[3] == '0' then
    id = redis.call('XADD', stream, '*', 'event_id', event_id, 'message', message)
  else
    id = redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*',
                    'event_id', event_id, 'message', message)
  end
  redis.call('ZADD', seen, string.match(id, '^%d+'), event_id)
  return id
end

local ids = {}
for i = 7, #ARGV, 2 do
  local known = redis.call('ZSCORE', seen, ARGV[i]) and redis.call('XLEN', stream) > 0
  ids[#ids + 1] = known and last_id() or append(ARGV[i], ARGV[i + 1])
end
redis.call('ZREMRANGEBYRANK', seen, 0, -ARGV[4] - 1)
redis.call('PUBLISH', ARGV[1], ARGV[2] .. ' ' .. ids[#ids])
return ids
