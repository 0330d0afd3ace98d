// SPDX-License-Identifier: Apache-2.0

// Package threats attacks one node's network stack, row by row of the threat
// matrix, as root inside a sandbox would.
//
// The stack is the real one: netpol/link makes the links and the second layer,
// netpol/enforce attaches the programs, netpol/dns answers names. Only
// containerd is left out, so that an attacker has more than a sandbox gives:
// raw sockets, every capability in its network namespace.
//
//	box    a sandbox                     host: this process's own namespace
//	open   a plain veth, no filter  ---  routes, NAT, second layer   ---  far: the internet
//
// Every attack is first made from the open box and must arrive: a row whose
// control does not see the attack has failed, whatever the sandbox does. The
// registry in rows_test.go lists all rows with their verdict and their test;
// docs/threat-model.md must say the same.
package threats
