-- Takes messages of a group for a consumer: what others abandoned first, then what nobody has read.
-- KEYS: stream
-- ARGV: group, consumer, lease in ms, how many
-- Returns {entry id, which delivery this is, message} for each.
-- XAUTOCLAIM would not tell the deliveries, and before Redis 7 not which entries were trimmed.
local stream, group, consumer, lease = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local count = tonumber(ARGV[4])
local taken = {}

for _, pending in ipairs(redis.call('XPENDING', stream, group, 'IDLE', lease, '-', '+', count)) do
  local id, deliveries = pending[1], pending[4]
  if #redis.call('XRANGE', stream, id, id) == 0 then
    redis.call('XACK', stream, group, id)
  else
    local claimed = redis.call('XCLAIM', stream, group, consumer, lease, id)[1]
    taken[#taken + 1] = {id, deliveries + 1, claimed[2][4]}
  end
end

if #taken < count then
  local unread = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count - #taken,
                            'STREAMS', stream, '>')
  for _, entry in ipairs(unread and unread[1][2] or {}) do
    taken[#taken + 1] = {entry[1], 1, entry[2][4]}
  end
end
return taken
