-- Reports on streams and their groups, all at one instant, and tidies up.
-- KEYS: streams
-- ARGV: lease in ms, ms after which a group that nobody served is forgotten, then for each stream:
--       length to trim to (0: never), ids of the sender's oldest and newest entries (or '')
-- Returns for each stream {1 if one of those entries is gone, groups}; a group is
-- {name, 1 if it is being served, pending, unread, id below which it needs nothing}.
local lease, forget = tonumber(ARGV[1]), tonumber(ARGV[2])

local function fields(flat)
  local named = {}
  for i = 1, #flat, 2 do
    named[flat[i]] = flat[i + 1]
  end
  return named
end

-- Milliseconds since any consumer of the group asked for anything; idle consumers are dismissed.
local function idle(stream, group)
  local least
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local consumer = fields(flat)
    if consumer.idle > forget and consumer.pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer.name)
    end
    least = math.min(least or consumer.idle, consumer.idle)
  end
  return least or 0
end

local function unread(stream, group)
  if group.lag then
    return group.lag
  end
  -- Before Redis 7, or after deletions, it has to be counted; more than this need not be known.
  return #redis.call('XRANGE', stream, '(' .. group['last-delivered-id'], '+', 'COUNT', 100)
end

local function needed_from(stream, group)
  if group.pending > 0 then
    return redis.call('XPENDING', stream, group.name)[2]
  end
  return group['last-delivered-id']
end

local function before(one, other)
  local one_ms, one_seq = string.match(one, '(%d+)-(%d+)')
  local other_ms, other_seq = string.match(other, '(%d+)-(%d+)')
  if one_ms == other_ms then
    return tonumber(one_seq) < tonumber(other_seq)
  end
  return tonumber(one_ms) < tonumber(other_ms)
end

-- Never removes what a group has not acknowledged; a bounded piece of work at a time.
local function trim(stream, groups, length)
  local excess = math.min(redis.call('XLEN', stream) - length, 2048)
  if excess <= 0 then
    return
  end
  local head = redis.call('XRANGE', stream, '-', '+', 'COUNT', excess + 1)
  local first = head[#head][1]
  for _, group in ipairs(groups) do
    if before(group[5], first) then
      first = group[5]
    end
  end
  redis.call('XTRIM', stream, 'MINID', first)
end

local function groups_of(stream)
  local groups = {}
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = fields(flat)
    local idle_ms = idle(stream, group.name)
    if idle_ms > forget then
      redis.call('XGROUP', 'DESTROY', stream, group.name)
    else
      groups[#groups + 1] = {group.name, idle_ms < lease and 1 or 0, group.pending,
                             unread(stream, group), needed_from(stream, group)}
    end
  end
  return groups
end

local reports = {}
for i, stream in ipairs(KEYS) do
  local length, gone, groups = tonumber(ARGV[3 * i]), 0, {}
  for j = 3 * i + 1, 3 * i + 2 do
    if ARGV[j] ~= '' and #redis.call('XRANGE', stream, ARGV[j], ARGV[j]) == 0 then
      gone = 1
    end
  end
  if redis.call('EXISTS', stream) == 1 then
    groups = groups_of(stream)
    if length > 0 then
      trim(stream, groups, length)
    end
  end
  reports[i] = {gone, groups}
end
return reports
