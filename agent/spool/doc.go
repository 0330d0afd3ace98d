// SPDX-License-Identifier: Apache-2.0

// Package spool keeps usage records on disk until the gateway has acknowledged
// them.
//
// It owns one directory. It numbers records without gaps (node_seq), links them
// by hash, and knows nothing of sandboxes but their ids. It never sends, never
// drops a record that is not acknowledged, and never makes one up.
//
// # Promises
//
// A record is safe once Append returns nil: it survives kill -9 and loss of
// power, with its number. After any crash a batch is either whole or absent. An
// append that returned an error left nothing behind, unless the process died
// before it could clean up; then the batch may be whole, and appending it again
// changes nothing. An acknowledgement covers every number up to and including
// its own and is on disk once Ack returns.
//
// A record that is already spooled is dropped by Append, also after a restart
// and after the segment that held it is gone. The same id with another content
// is ErrConflict; a number of a sandbox's meter that skips one is ErrSkipped,
// for it means that usage was lost on its way here. In both cases nothing of
// the batch is kept.
//
// # Files
//
//	lock                        flock of the process that has the directory open
//	ack                         highest acknowledged node_seq
//	00000000000000000001.seg    a segment; the name is its first node_seq
//	*.tmp                       left by a crash, removed by Open
//
// A segment is a sequence of frames. Numbers are little endian.
//
//	offset  bytes
//	     0      4  "BhF1"
//	     4      1  type: 1 header, 2 index, 3 batch, 4 forget
//	     5      3  zero
//	     8      4  length of the payload, at most 64 MiB
//	    12      4  CRC-32C over bytes 0 to 12, 16 to 24 and the payload
//	    16      8  durable: everything before this offset of the file was on
//	               disk when this frame was written
//	    24         payload
//
//	header   version u16 (1), first node_seq u64, hash of first-1 (32 bytes),
//	         number of index entries u32, node id (text)
//	index    entries: sandbox text, meter text, generation u64, seq u64, digest (16 bytes)
//	batch    first node_seq u64, count u32, records: length u32, protobuf of
//	         usage.v1.Record with node_seq, prev_hash and hash
//	forget   sandbox text
//
// A text is a length u16 and its bytes. A segment begins with one header and
// the index frames that the header announces: for each sandbox and meter the
// last record that was spooled before this segment. So the newest segment alone
// tells what has been spooled. The digest is over the record's content without
// node_seq, prev_hash and hash.
//
// ack is "BhA1", node_seq u64 and CRC-32C of both.
//
// # What a crash leaves
//
//   - A segment is written whole under a temporary name (header and index),
//     fsynced, renamed, and the directory fsynced; nothing is appended to it
//     before that. So a *.seg always has a whole header. The segment before it
//     was whole and fsynced, and never grows again.
//   - Appends write frames behind the last durable offset and fsync. A crash in
//     between leaves any subset of the written pages. Open takes the frames of
//     the newest segment up to the first that is not whole and truncates the
//     rest: nobody was told that it was kept.
//   - Unless the rest was durable: a later frame whose durable offset lies
//     beyond the first bad byte, or an acknowledgement beyond the last good
//     record, shows that the disk has lost data. Open then answers CorruptError
//     and touches nothing. A bad frame in an older segment is always corruption;
//     Read and Scan report it when they come to it.
//   - ack is replaced by rename, then segments are removed. A removed file may
//     come back: Open removes again what lies wholly below ack. Without a
//     readable ack everything kept counts as not acknowledged, and is sent
//     again, which changes nothing at the gateway.
//   - A write or fsync that fails is truncated away. While that is impossible
//     every append fails. After a failed fsync the file is not trusted with new
//     data: a new segment is begun.
//   - A forget frame is not fsynced by itself. If it is lost, an entry of a
//     sandbox that is gone stays in the index; it does no harm.
//
// Lock order: Spool.io, then Spool.mu. Whoever holds io alone writes to the
// directory; mu guards what readers see.
package spool
