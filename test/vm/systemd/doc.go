// SPDX-License-Identifier: Apache-2.0

// Package systemd holds the tests that need a machine which systemd runs: the
// unit files as systemd reads them, and the agent as a service. Elsewhere they
// are skipped; the vm tier's systemd suite runs them.
package systemd
