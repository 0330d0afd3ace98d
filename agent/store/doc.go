// SPDX-License-Identifier: Apache-2.0

// Package store keeps what must survive a crash of the agent in one bbolt
// file: the record of every sandbox, the names and slots that they hold, how
// far each is metered, and what is spent of every byte budget.
//
//	meta
//	  version    u32, big endian: schema version, now 2
//	  node_id    text: UUID of the node, made once
//	  created    text: RFC 3339
//	sandboxes
//	  <id>       JSON of sandbox.Record
//	names
//	  <tenant> NUL <name>   id of the sandbox that has the name until it is deleted
//	slots
//	  <slot u32, big endian>   id of the sandbox that holds the slot until it is Stopped
//	marks
//	  <id>       JSON of meter.Mark
//	budgets      since version 2
//	  tenant/<tenant>         JSON of budget.Entry: spent by the tenant and all below it
//	  sandbox/<id>/<tenant>   the same of one sandbox, under the policy of that tenant
//
// Every method is one transaction, on disk when it returns; on an error
// nothing of it is. A reservation claims name and slot in the transaction that
// writes the record, so no crash can leave one without the other. The file is
// locked: one agent per state directory.
//
// Migrations are numbered; migrations[n] brings version n+1 to n+2. A file of a
// later version is refused, not guessed at. testdata has a file of every
// released version.
package store
